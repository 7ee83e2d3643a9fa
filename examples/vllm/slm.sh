#!/usr/bin/env bash
# Serve an SLM with a real vLLM on the CPU, alone and with its selector inside, and compare with this process. See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

MODEL=${MODEL:-s2t_agents/demo/weights/slm}
SELECTOR=${SELECTOR:-s2t-demo}
NAME=s2t-demo

serve "$MODEL" "$NAME" "$PORT"
"$PYTHON" examples/vllm/compare_slm.py --address "vllm://127.0.0.1:$PORT/$NAME" --slm "$MODEL" "$@"
stop

export S2T_SELECTOR=$SELECTOR
serve "$MODEL" "$NAME" "$PORT"
"$PYTHON" examples/vllm/compare_slm.py --address "vllm://127.0.0.1:$PORT/$NAME" --slm "$MODEL" --selector "$SELECTOR" "$@"

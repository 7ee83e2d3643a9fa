#!/usr/bin/env bash
# Serve an SLM with a real vLLM on the CPU, alone and with its selector inside, and compare with this process. See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

MODEL=${MODEL:-s2t_agents/demo/weights/slm}
SELECTOR=${SELECTOR:-s2t-demo}
NAME=s2t-demo

# the plugin registers itself: this package in vLLM's environment, what it needs besides is there or comes with it
"$VLLM_VENV/bin/python" -c "import s2t_agents.integrations.vllm" 2>/dev/null \
  || "$VLLM_VENV/bin/python" -m pip install --quiet --upgrade-strategy only-if-needed .

serve "$MODEL" "$NAME"
"$PYTHON" examples/vllm/compare_slm.py --address "vllm://127.0.0.1:$PORT/$NAME" --slm "$MODEL" "$@"
stop

export S2T_SELECTOR=$SELECTOR
serve "$MODEL" "$NAME"
"$PYTHON" examples/vllm/compare_slm.py --address "vllm://127.0.0.1:$PORT/$NAME" --slm "$MODEL" --selector "$SELECTOR" "$@"

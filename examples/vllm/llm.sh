#!/usr/bin/env bash
# Serve the bundled LLM with a real vLLM on the CPU and check that its picks are LocalLLM's. See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

MODEL=${MODEL:-s2t_agents/demo/weights/llm}
NAME=s2t-demo-llm

serve "$MODEL" "$NAME" "$PORT"
"$PYTHON" examples/vllm/compare.py --url "http://127.0.0.1:$PORT/v1" --model "$NAME" --llm "$MODEL" "$@"

#!/usr/bin/env bash
# What the selector costs a vLLM server on the CPU: one without and one with it, asked in turns, at three trigger rates.
# See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

MODEL=${MODEL:-s2t_agents/demo/weights/slm}
SELECTOR=${SELECTOR:-s2t-demo}

"$PYTHON" examples/vllm/cost.py --slm "$MODEL" --arithmetic "$SELECTOR"
nats=$("$PYTHON" examples/vllm/cost.py --slm "$MODEL" --nats 0.01 0.1)
at() { "$PYTHON" -c "import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])" "$nats" "$1"; }
serve "$MODEL" s2t-demo "$PORT"
stock=${started[0]}
for trigger in 99 "$(at 0.01)" "$(at 0.1)"; do
  S2T_SELECTOR=$SELECTOR S2T_TRIGGER=$trigger serve "$MODEL" s2t-demo "$((PORT + 1))"
  "$PYTHON" examples/vllm/cost.py --slm "$MODEL" --stock "$PORT:$stock" --plugin "$((PORT + 1)):${started[1]}" "$@"
  stop_last
done

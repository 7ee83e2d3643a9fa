#!/usr/bin/env bash
# Two vLLM servers (SLM, LLM), `s2t collect` with both, and the same labels made in this process. See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

FOLDER=${FOLDER:-$(mktemp -d)}
LLM_PORT=$((PORT + 1))

serve s2t_agents/demo/weights/slm s2t-demo "$PORT"
serve s2t_agents/demo/weights/llm s2t-demo-llm "$LLM_PORT"
sed -e "s|runs/vllm|$FOLDER/served|" -e "s|:8399/|:$PORT/|" -e "s|:8400/|:$LLM_PORT/|" examples/vllm/labels.toml >"$FOLDER/served.toml"
sed -e '/_server\|_price/d' -e "s|runs/vllm|$FOLDER/here|" examples/vllm/labels.toml >"$FOLDER/here.toml"
S2T="$(dirname "$PYTHON")/s2t"
time "$S2T" collect "$FOLDER/served.toml" --part train --usd 1 "$@"
stop
time "$S2T" collect "$FOLDER/here.toml" --part train "$@"
"$PYTHON" examples/vllm/compare_labels.py "$FOLDER/served/rollouts/train" "$FOLDER/here/rollouts/train"

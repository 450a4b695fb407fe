#!/usr/bin/env bash
# Run an experiment to its end and keep what it found in results/NAME; the README's table is written anew.
# Usage: scripts/publish.sh EXPERIMENT NAME
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 2 ] || usage
setup_venv local
go "$1"
run="runs/$(basename "$experiment" .yaml)" # not a demo's runs/miniature
"$CPT_RFT" run "$experiment" output="$run"
export PYTHONPATH="$ROOT"
"$VENV/bin/python" scripts/publish.py "$run" "results/$2" --command "bash scripts/publish.sh $1 $2"
"$VENV/bin/python" scripts/update_readme.py
say "kept in results/$2"

#!/usr/bin/env bash
# The table of an experiment, results.json and report.html, from what its run directory holds; nothing is trained.
# Usage: scripts/report.sh EXPERIMENT [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 1 ] || usage
setup_venv local
go "$1"
exec "$CPT_RFT" report "$experiment" "${@:2}"

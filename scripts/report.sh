#!/usr/bin/env bash
# The table of an experiment, results.json, report.html and report/ (every table as CSV, LaTeX and Markdown, every figure
# as SVG), from what its run directory holds; nothing is trained. Twice gives the same bytes.
# Usage: scripts/report.sh EXPERIMENT|RUN_DIRECTORY [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 1 ] || usage
setup_venv local
go "$1"
exec "$CPT_RFT" report "$experiment" "${@:2}"

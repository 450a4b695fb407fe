#!/usr/bin/env bash
# The whole study in miniature: set-up, run, table, report. What is done already is not done again.
# Usage: scripts/demo.sh [options and key=value changes of "cpt-rft run"]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
setup_venv local
cd "$ROOT"
exec "$CPT_RFT" run configs/experiments/miniature.yaml "$@"

#!/usr/bin/env bash
# The real datasets, downloaded, checked and written below data/ (or --out DIRECTORY). Killed, it goes on where it was.
# Usage: scripts/prepare_data.sh TASK...|all [options of "cpt-rft data prepare"]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -gt 0 ] || usage
setup_venv local,data
cd "$ROOT"
exec "$CPT_RFT" data prepare "$@"

#!/usr/bin/env bash
# Which rows of a task the model can learn from: it tries each of them before the stage is trained. Resumes.
# Usage: scripts/filter_instances.sh EXPERIMENT METHOD TASK [--keep-text] [KEY=VALUE ...]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 3 ] || usage
setup_venv local,data
go "$1"
exec "$CPT_RFT" filter "$experiment" "${@:2}"

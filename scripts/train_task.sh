#!/usr/bin/env bash
# Train one stage: METHOD learns TASK from the stage before it (a joint method's only stage is "multitask").
# Usage: scripts/train_task.sh EXPERIMENT METHOD TASK [--seed S] [--order O] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 3 ] || usage
setup_venv local
go "$1"
exec "$CPT_RFT" train "$experiment" "${@:2}"

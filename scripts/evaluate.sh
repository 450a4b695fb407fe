#!/usr/bin/env bash
# Score one stage (without METHOD and TASK: the base model) on every task and general ability, in every prompt style.
# Usage: scripts/evaluate.sh EXPERIMENT [METHOD TASK] [--seed S] [--order O] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 1 ] || usage
setup_venv local
go "$1"
exec "$CPT_RFT" evaluate "$experiment" "${@:2}"

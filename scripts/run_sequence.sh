#!/usr/bin/env bash
# One method over all tasks of an experiment, step by step: score the base, train a task, score the checkpoint, go on.
# Usage: scripts/run_sequence.sh EXPERIMENT METHOD [--seed S] [--order O] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 2 ] || usage
setup_venv local
go "$1"
tasks="$("$CPT_RFT" plan "$experiment" --method "$2" --stages "${@:3}")"
bash "$ROOT/scripts/evaluate.sh" "$experiment" "${@:3}"
for task in $tasks; do
    bash "$ROOT/scripts/train_task.sh" "$experiment" "$2" "$task" "${@:3}"
    bash "$ROOT/scripts/evaluate.sh" "$experiment" "$2" "$task" "${@:3}"
done
say "table and page: scripts/report.sh $1"

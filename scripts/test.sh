#!/usr/bin/env bash
# The tests: the fast tier, or with --full all that a landing needs. Other arguments go to pytest (fast tier).
# Usage: scripts/test.sh [--full | pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
setup_venv local,lora,parallel,data,notebook,dev
cd "$ROOT"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
python="$VENV/bin/python"
[ "${1:-}" = --full ] || exec "$python" -m pytest -q "${@:---numprocesses=2}"
step lint "$python" -m ruff check .
step format "$python" -m ruff format --check .
step types "$python" -m mypy
step "fast tests" "$python" -m pytest -q --numprocesses=2 --cov --cov-report=
step coverage "$python" -m coverage report --fail-under=95 --include="$COVERED"
step "base in its consumers" bash scripts/check_base.sh cpt_rft/miniature/base # makes environments that full tests use
step "full tests" "$python" -m pytest -q -m full
step mutations bash scripts/mutate.sh
finish

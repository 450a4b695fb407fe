#!/usr/bin/env bash
# A test too long for every day, by its name; what it found is kept in results/campaigns/NAME.json and listed there.
# Usage: scripts/campaign.sh NAME|--help
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 1 ] || usage
setup_venv local,lora,parallel,data,notebook,dev
cd "$ROOT"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$ROOT"
exec "$VENV/bin/python" scripts/campaign.py "$1"

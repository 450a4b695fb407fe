#!/usr/bin/env bash
# The environment of lm-evaluation-harness for 'python -m eval.delegate', from its lock; prints its Python. 800 MB, no torch;
# made once, in ${CPT_RFT_ENVS:-.envs}.
# Usage: scripts/setup_lm_eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 0 ] || usage
engine_environment lm_eval
echo "$VENV/bin/python"

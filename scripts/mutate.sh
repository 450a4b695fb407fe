#!/usr/bin/env bash
# Break the code in listed ways and require that the tests notice. Usage: scripts/mutate.sh [--jobs N] [--only TEXT]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
setup_venv local,lora,parallel,data,notebook,dev
cd "$ROOT"
exec "$VENV/bin/python" -m tests.mutations.harness "$@"

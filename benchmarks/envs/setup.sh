#!/usr/bin/env bash
# Makes the locked environments of the peers, once each, in ${CPT_RFT_ENVS:-.envs}, and prints where each one's Python is.
# vLLM's and LLaMA-Factory's are those of scripts/check_base.sh.
# Usage: benchmarks/envs/setup.sh trl|vllm|llamafactory...
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
shims="$ROOT/tests/engine_envs" shared="$LOCKS"
[ $# -gt 0 ] || usage
for name in "$@"; do
    LOCKS="$shared"
    [ -f "$LOCKS/$name.lock" ] || LOCKS="$ROOT/benchmarks/envs"
    [ -f "$LOCKS/$name.lock" ] || die "There is no lock for $name." "use trl, vllm or llamafactory"
    changes=("$shims"/*cpu_shim*.py)
    [ "$name" != llamafactory ] || changes=()
    engine_environment "$name" "${changes[@]}"
    [ -f "$VENV/repaired" ] || { "$VENV/bin/python" "$shims/install_cpu_shims.py" >&2 && touch "$VENV/repaired"; }
    echo "$VENV/bin/python"
done

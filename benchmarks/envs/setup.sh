#!/usr/bin/env bash
# Makes the locked environments of the peers, once each, in ${CPT_RFT_ENVS:-.envs}, and prints where each one's Python is.
# Usage: benchmarks/envs/setup.sh trl|vllm|llamafactory...
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
shims="$ROOT/scripts/engine_envs"
envs="${CPT_RFT_ENVS:-$ROOT/.envs}"
[ $# -gt 0 ] || usage
mkdir -p "$envs" || die "$envs could not be made." "set CPT_RFT_ENVS to a folder that can be written"
for name in "$@"; do
    lock="$ROOT/benchmarks/envs/$name.lock"
    [ -f "$lock" ] || lock="$shims/$name.lock" # shared with scripts/check_base.sh, and so is the folder
    [ -f "$lock" ] || die "There is no lock for $name." "use trl, vllm or llamafactory"
    VENV="$envs/$name-$(cat "$lock" "$shims"/*cpu_shim*.py | sha256sum | cut -c1-12)"
    if [ ! -f "$VENV/ready" ]; then
        (export CPT_RFT_PYTHON="${CPT_RFT_PYTHON:-python3.11 python3 python3.12 python3.13}" && make_venv)
        install_torch && pip_install "$(grep '^torch==' "$lock")" && pip_install --no-deps -r "$lock"
        "$VENV/bin/python" "$shims/install_cpu_shims.py" >&2 && touch "$VENV/ready"
    fi
    echo "$VENV/bin/python"
done

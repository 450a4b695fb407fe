#!/usr/bin/env bash
# Does every consumer load the same model? transformers 4.56.2, 5.5 and 5.23 must give equal logits, vLLM's CPU build
# equal greedy text, and LLaMA-Factory must train a few steps. Without a DIRECTORY: a throw-away model of our own form.
# Environments (about 10 GB) are made once, in ${CPT_RFT_ENVS:-.envs}, and kept by the hash of their lock file.
# Usage: scripts/check_base.sh [DIRECTORY] [--only transformers-4.56.2|transformers-5.5|transformers-5.23|vllm|llamafactory]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
here="$ROOT/scripts/engine_envs"
envs="${CPT_RFT_ENVS:-$ROOT/.envs}"
chosen=(transformers-5.23 transformers-4.56.2 transformers-5.5 vllm llamafactory)
model="" only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --only) only="${2:-}"; shift 2 || usage ;;
        -*) usage ;;
        *) model="$(cd "$1" 2>/dev/null && pwd)" || die "There is no directory $1." "name a checkpoint directory"; shift ;;
    esac
done
if [ -n "$only" ]; then
    [ -f "$here/$only.lock" ] || die "Unknown consumer $only." "use one of ${chosen[*]}"
    chosen=(transformers-5.23) # what the others are compared with
    [ "$only" = transformers-5.23 ] || chosen+=("$only")
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
mkdir -p "$envs" || die "$envs could not be made." "set CPT_RFT_ENVS to a folder that can be written"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

environment() { # sets VENV to the environment of a consumer, made first if it is not there whole
    local lock="$here/$1.lock"
    VENV="$envs/$1-$(cat "$lock" "$here"/*cpu_shim*.py | sha256sum | cut -c1-12)"
    [ ! -f "$VENV/ready" ] || return 0
    # Python 3.11 first: the locks were made with it.
    (export CPT_RFT_PYTHON="${CPT_RFT_PYTHON:-python3.11 python3 python3.12 python3.13}" && make_venv) || return 1
    # torch first and with all that it needs, so that nothing after it can bring another build. The lock is complete.
    (install_torch && pip_install "$(grep '^torch==' "$lock")" && pip_install --no-deps -r "$lock") || return 1
    "$VENV/bin/python" "$here/install_cpu_shims.py" && touch "$VENV/ready"
}

probe() { # runs a consumer's probe with nothing of ours importable; one clear line if it fails
    local log="$envs/$1.log"
    environment "$1" || { echo "FAIL $1: its environment could not be made in $VENV"; return 1; }
    (cd "$work" && timeout 900 "$VENV/bin/python" -I "$here/probe_${1%%-*}.py" "$model" "$work" "$1") >"$log" 2>&1 ||
        { echo "FAIL $1: $(grep -v '^[[:space:]]*$' "$log" | tail -n 1) (log: $log)"; return 1; }
}

environment transformers-5.23
reference="$VENV/bin/python"
PYTHONPATH="$ROOT" "$reference" "$here/prepare.py" "$work" ${model:+--model-given}
model="${model:-$work/model}"
failed=0
for name in "${chosen[@]}"; do probe "$name" || failed=1; done
"$reference" "$here/compare.py" "$work" "${chosen[@]}" || failed=1
exit "$failed"

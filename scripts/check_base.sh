#!/usr/bin/env bash
# Does every consumer load the same model? transformers 4.56.2, 5.5 and 5.23 must give equal logits, vLLM's CPU build
# equal greedy text, and LLaMA-Factory must train a few steps. Without a DIRECTORY: a throw-away model of our own form.
# Environments (about 10 GB) are made once, in ${CPT_RFT_ENVS:-.envs}, and kept by the hash of their lock file.
# Usage: scripts/check_base.sh [DIRECTORY] [--only transformers-4.56.2|transformers-5.5|transformers-5.23|vllm|llamafactory]
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
here="$LOCKS" shims="$ROOT/tests/engine_envs"
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
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

environment() { # sets VENV to the environment of a consumer, with what a machine without CUDA needs besides
    if [ "$1" = llamafactory ]; then
        engine_environment "$1"
    else
        engine_environment "$1" "$shims"/*cpu_shim*.py
    fi || return 1
    [ -f "$VENV/repaired" ] || { "$VENV/bin/python" "$shims/install_cpu_shims.py" && touch "$VENV/repaired"; }
}

probe() { # runs a consumer's probe with nothing of ours importable; one clear line if it fails
    local log="$ENVS/$1.log"
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

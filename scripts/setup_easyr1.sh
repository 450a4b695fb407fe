#!/usr/bin/env bash
# The environment of the engine easyr1, from its lock: with an NVIDIA GPU the stack that EasyR1 was validated on (vllm 0.11.0,
# torch 2.8.0; about 12 GB), without one what its trainer needs beside our own worker (about 2 GB); made once, in
# ${CPT_RFT_ENVS:-.envs}. EasyR1 itself is on no package index: it comes from the submodule.
# Usage: scripts/setup_easyr1.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 0 ] || usage
[ -f "$ROOT/EasyR1/setup.py" ] || die "EasyR1 is not checked out in $ROOT/EasyR1." "git submodule update --init EasyR1"
shims="$ROOT/tests/engine_envs"
if has_gpu; then
    engine_environment easyr1
else
    engine_environment easyr1_cpu
    [ -f "$VENV/repaired" ] || { "$VENV/bin/python" "$shims/install_cpu_shims.py" >&2 && touch "$VENV/repaired"; }
fi
pip_install --no-deps --editable "$ROOT/EasyR1" --editable "$ROOT"
"$VENV/bin/python" -m cpt_rft.engines.easyr1.packages
"$VENV/bin/python" -I "$ROOT/scripts/engine_envs/describe.py" verl cpt-rft torch vllm transformers ray omegaconf
! has_gpu || say "EasyR1's attention on GPUs needs: $VENV/bin/python -m pip install flash-attn==2.8.3 --no-build-isolation"
say "another route is the framework's container image, hiyouga/verl:ngc-th2.8.0-cu12.9-vllm0.11.0 (docs/easyr1.md)"

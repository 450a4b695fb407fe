#!/usr/bin/env bash
# The environment of the engine llamafactory, from its lock: transformers and deepspeed of releases that work together.
# LLaMA-Factory itself comes from the submodule where it is checked out, else the identical release from the package index.
# About 3 GB, without a GPU less; made once, in ${CPT_RFT_ENVS:-.envs}.
# Usage: scripts/setup_llamafactory.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 0 ] || usage
engine_environment llamafactory
[ ! -f "$ROOT/LLaMA-Factory/pyproject.toml" ] || pip_install --no-deps --editable "$ROOT/LLaMA-Factory"
"$VENV/bin/python" -I "$ROOT/scripts/engine_envs/describe.py" llamafactory torch transformers deepspeed accelerate peft
say "for flash attention on GPUs: $VENV/bin/python -m pip install flash-attn --no-build-isolation, then engine.attention=fa2"

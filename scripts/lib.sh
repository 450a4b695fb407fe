# Shared by the run scripts: where the project is, and a virtual environment of its own with the project in it.
#   CPT_RFT_VENV         where that environment lives (default: .venv in the project)
#   CPT_RFT_PYTHON       the Python 3.11 to 3.13 to make it with (default: the first one found)
#   CPT_RFT_TORCH_INDEX  address of PyTorch's CPU wheel index, for machines whose pip settings do not know one
#   CPT_RFT_ENVS         where the environments of engines and consumers live (default: .envs in the project)
# shellcheck shell=bash
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${CPT_RFT_VENV:-$ROOT/.venv}"
CPT_RFT="$VENV/bin/cpt-rft"
ENVS="${CPT_RFT_ENVS:-$ROOT/.envs}"
LOCKS="$ROOT/scripts/engine_envs"
TORCH_VERSION=2.13.0

say() { printf '[cpt-rft] %s\n' "$*" >&2; }
die() { say "$1 Fix: $2"; exit 2; }
usage() { sed -n 's/^# Usage: /usage: /p' "$0" >&2; exit 2; }

find_python() {
    local name
    for name in ${CPT_RFT_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "No Python 3.11, 3.12 or 3.13 was found." "install one (Debian, Ubuntu: apt install python3 python3-venv) or set CPT_RFT_PYTHON"
}

# What the environment must have been made from: these dependencies, for this folder.
fingerprint() { { echo "$ROOT $1"; cat "$ROOT/pyproject.toml"; } | cksum; }

make_venv() {
    local python
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments." "install the module (Debian, Ubuntu: apt install python3-venv)"
    say "making a virtual environment in $VENV with $("$python" -V)"
    "$python" -m venv --clear "$VENV" || die "$VENV could not be made." "free some disk or set CPT_RFT_VENV to a folder that can be written"
}

pip_install() { # pip's progress bars on a terminal, only its errors in a log
    local loudness=--progress-bar=on
    [ -t 2 ] || loudness=-qq
    "$VENV/bin/python" -m pip install "$loudness" --disable-pip-version-check "$@" ||
        die "pip could not install: $*." "see pip's message above; the next start goes on from here"
}

has_gpu() { command -v nvidia-smi && nvidia-smi; } >/dev/null 2>&1

# On Linux the default index answers "torch" with a CUDA build of some gigabytes, useless without an NVIDIA GPU.
install_torch() {
    [ "$(uname -s)" = Linux ] && ! has_gpu || return 0
    if [ -n "${CPT_RFT_TORCH_INDEX:-}" ]; then
        say "no NVIDIA GPU: torch $TORCH_VERSION from $CPT_RFT_TORCH_INDEX (about 200 MB)"
        pip_install --index-url "$CPT_RFT_TORCH_INDEX" "torch==$TORCH_VERSION"
    else
        say "no NVIDIA GPU: torch $TORCH_VERSION from your pip settings (a CPU build is about 200 MB; if pip starts on"
        say "gigabytes of CUDA libraries, stop it and set CPT_RFT_TORCH_INDEX to PyTorch's CPU wheel index)"
        pip_install "torch==$TORCH_VERSION"
    fi
}

# setup_venv EXTRAS: the environment holds the project with these extras; nothing happens if it does already.
setup_venv() {
    local extras="$1" stamp="$VENV/cpt-rft-${1//,/-}.stamp"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$extras")" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        return
    fi
    if ! grep -qsxF "$ROOT" "$VENV/cpt-rft.root" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        make_venv
        echo "$ROOT" >"$VENV/cpt-rft.root"
    fi
    [ -d "$(echo "$VENV"/lib/python3*/site-packages/torch)" ] || install_torch
    say "installing cpt-rft[$extras] (the libraries are about 300 MB without torch)"
    pip_install --editable "$ROOT[$extras]"
    fingerprint "$extras" >"$stamp"
}

# engine_environment NAME [FILE...]: sets VENV to the environment of a lock, made first if it is not there whole. It is
# known by the content of the lock and of the FILEs, which change what is in it.
engine_environment() {
    local lock="$LOCKS/$1.lock" torch
    VENV="$ENVS/$1-$(cat "$lock" "${@:2}" | sha256sum | cut -c1-12)"
    [ ! -f "$VENV/ready" ] || return 0
    mkdir -p "$ENVS" || die "$ENVS could not be made." "set CPT_RFT_ENVS to a folder that can be written"
    # Python 3.11 first: the locks were made with it.
    (export CPT_RFT_PYTHON="${CPT_RFT_PYTHON:-python3.11 python3 python3.12 python3.13}" && make_venv) || return 1
    # torch first and with all that it needs, so that nothing after it can bring another build. The lock is complete.
    torch="$(grep '^torch==' "$lock" || true)"
    (export DS_BUILD_OPS=0 && { [ -z "$torch" ] || { install_torch && pip_install "$torch"; }; } &&
        pip_install --no-deps -r "$lock") || return 1
    touch "$VENV/ready"
}

# go EXPERIMENT: change to the project, where runs/ is; EXPERIMENT may be a path from the caller's folder, a path from the
# project, or the bare name of a file in configs/experiments; a run directory counts too. Sets $experiment.
go() {
    experiment="$1"
    [ ! -f "$1" ] && [ ! -f "$1/config.json" ] || experiment="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
    cd "$ROOT"
}

# step NAME COMMAND...: run it, say how long it took, remember a failure and go on; `finish` tells and exits.
FAILED=()
COVERED='cpt_rft/algos/*,cpt_rft/scoring/*,cpt_rft/sequence/*,eval/metrics.py' # at least 95 % of their lines
step() {
    local name="$1" before=$SECONDS
    say "== $name"
    "${@:2}" || FAILED+=("$name")
    say "== $name took $((SECONDS - before)) s"
}
finish() {
    [ ${#FAILED[@]} -eq 0 ] || die "failed: ${FAILED[*]}." "see their output above"
    say "all passed in $SECONDS s"
}

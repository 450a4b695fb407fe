"""What a stage is (identity) and how it came about (provenance).

The identity decides: equal, and a stage is skipped; different, and it is refused. Provenance is a record and never
enters an identity. Both are under one hash, so that a manifest edited by hand is noticed.
"""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cpt_rft.errors import CheckpointError
from cpt_rft.files import (
    FileRecord,
    hash_tree,
    list_tree,
    sha256_file,
    sha256_json,
    tree_problem,
    tree_sha256,
    write_json_atomic,
)

MANIFEST_NAME = "manifest.json"
Json = dict[str, Any]
# What can change a checkpoint. Reports, progress bars and the miniature world (its rows are hashed) cannot.
_CODE = ("algos", "engines", "methods", "scoring", "data", "checkpoint.py", "prompts.py", "seeds.py")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "accelerate", "peft")


@dataclass(frozen=True)
class Manifest:
    """A stage's manifest, checked against its own hash."""

    identity: Json
    provenance: Json

    @property
    def identity_sha256(self) -> str:
        """The hash that children carry as their parent's identity."""
        return sha256_json(self.identity)

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file of the checkpoint."""
        return {name: FileRecord(*record) for name, record in self.provenance["files"].items()}

    @property
    def checkpoint_sha256(self) -> str:
        """One hash for the whole checkpoint."""
        return tree_sha256(self.files)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, whole or not at all."""
    body = {
        "identity": manifest.identity,
        "identity_sha256": manifest.identity_sha256,
        "provenance": manifest.provenance,
    }
    write_json_atomic(directory / MANIFEST_NAME, {**body, "manifest_sha256": sha256_json(body)})


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        CheckpointError: It is missing, is not JSON, or was edited by hand.
    """
    path = directory / MANIFEST_NAME
    fix = f"restore it from a backup, or delete {directory} and give the same command again to make the stage anew"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        stated = body.pop("manifest_sha256")
        manifest = Manifest(body["identity"], body["provenance"])
        if body["identity_sha256"] != manifest.identity_sha256 or stated != sha256_json(body):
            raise CheckpointError(f"{path} was edited by hand: its content does not fit its own hash.", fix)
        manifest.files  # noqa: B018  (the shape is checked here once)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.", fix) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a manifest ({type(error).__name__}: {error}).", fix) from error
    return manifest


def check_checkpoint(directory: Path, files: Mapping[str, FileRecord], *, full: bool, fix: str) -> None:
    """Compare a checkpoint with its record.

    Raises:
        CheckpointError: A file is missing, truncated, changed (with ``full``) or surplus.
    """
    problem = tree_problem(directory, dict(files), full=full)
    if problem is None:
        surplus = sorted(set(list_tree(directory)) - set(files))
        problem = f"{directory / surplus[0]} does not belong to the checkpoint" if surplus else None
    if problem is not None:
        raise CheckpointError(f"{problem}.", fix)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted key.

    >>> dict(flat({"a": {"b": 1}, "c": [2]}))
    {'a.b': 1, 'c': [2]}
    """
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from flat(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def differences(there: Json, asked: Json, ignore: frozenset[str] = frozenset()) -> list[str]:
    """What differs between two plain objects, each as ``key is X there, Y is asked for``.

    >>> differences({"lr": 1.0, "seed": 0}, {"lr": 2.0, "seed": 0})
    ['lr is 1.0 there, 2.0 is asked for']
    """
    left, right = dict(flat(there)), dict(flat(asked))
    absent = "absent"
    return [
        f"{key} is {_short(left.get(key, absent))} there, {_short(right.get(key, absent))} is asked for"
        for key in [*left, *(key for key in right if key not in left)]
        if key not in ignore and left.get(key, absent) != right.get(key, absent)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def code_sha256() -> str:
    """A hash of the source files that can change a checkpoint."""
    package = Path(__file__).resolve().parent
    sources: dict[str, str] = {}
    for entry in _CODE:
        paths = [package / entry] if entry.endswith(".py") else sorted((package / entry).rglob("*.py"))
        sources |= {path.relative_to(package).as_posix(): sha256_file(path) for path in paths}
    return sha256_json(sources)


def make_provenance(
    checkpoint: Path,
    *,
    code: str,
    started: float,
    train_seconds: float,
    parent_sha256: str,
    artefacts: Path | None = None,
) -> Json:
    """How the stage came about; its checkpoint must be complete.

    Args:
        checkpoint: Its directory.
        code: Hash of the code at the start of the stage; different code at its end is noted.
        started: Time of the stage's first start, in seconds since the epoch.
        train_seconds: Seconds of training steps, over all resumes.
        parent_sha256: Hash of the checkpoint that it started from.
        artefacts: Directory of what it leaves for later stages besides; recorded if it is there.
    """
    now = code_sha256()
    left = hash_tree(artefacts) if artefacts is not None else {}
    provenance = {
        "code": code if code == now else f"{code}+{now}",
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "host": {
            "name": socket.gethostname(),
            "machine": platform.machine(),
            "system": sys.platform,
            "cpus": os.cpu_count(),
        },
        "started": _utc(started),
        "finished": _utc(time.time()),
        "train_seconds": round(train_seconds, 3),
        "parent_sha256": parent_sha256,
        "files": {name: list(record) for name, record in hash_tree(checkpoint).items()},
    }
    return provenance | ({"artefacts": {name: list(record) for name, record in left.items()}} if left else {})


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

"""The evaluation contract: everything that must be equal before two scores may stand in one table.

A contract is a plain dictionary; its fingerprint is the sha256 of its canonical JSON and goes into every record.
Prompt style is not part of it but an axis of every record. Batch size is not either: it is resolved once into the
run's configuration.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpt_rft.errors import CheckpointError
from cpt_rft.files import sha256_json
from cpt_rft.prompts import PRESETS

#: Raised by hand whenever a change to extraction or scoring can change a score.
SCORER_VERSION = 2
SCORER_PRESET = "official"

Contract = dict[str, Any]

# Keys of preprocessor_config.json that decide the pixels a model sees; the same in the old and the new file form.
_VISION_KEYS = (
    "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "merge_size", "patch_size",
    "resample", "rescale_factor", "temporal_patch_size",
)  # fmt: skip


def evaluation_contract(
    checkpoint: Path, *, prompt_preset: str, max_new_tokens: int, dtype: str, temperature: float = 0.0, samples: int = 1
) -> Contract:
    """The contract under which `checkpoint` answers; temperature 0 is greedy decoding.

    Raises:
        CheckpointError: There is no checkpoint, or it lacks its image processor or its chat template.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: there is no such checkpoint directory.", "check the path")
    return {
        "vision": vision_spec(checkpoint),
        "chat_template": hashlib.sha256(_chat_template(checkpoint).encode()).hexdigest(),
        "prompts": {"preset": prompt_preset, **dataclasses.asdict(PRESETS[prompt_preset])},
        "decoding": {"temperature": temperature, "samples": samples, "top_p": 1.0, "vision_tokens": "suppressed"},
        "limits": {"max_new_tokens": max_new_tokens},
        "dtype": dtype,
        "extraction": {"cot": "last balanced box", "direct": "whole stripped response"},
        "scorer": {"preset": SCORER_PRESET, "version": SCORER_VERSION},
    }


def vision_spec(checkpoint: Path) -> dict[str, Any]:
    """The pixel budget of a checkpoint: limits, patch, merge, resampling, normalisation and processor class."""
    path = checkpoint / "preprocessor_config.json"
    newer = checkpoint / "processor_config.json"
    raw = _json(path) if path.is_file() or not newer.is_file() else _json(newer).get("image_processor", {})
    size = raw.get("size") or {}
    lowest = raw.get("min_pixels") or size.get("shortest_edge")
    highest = raw.get("max_pixels") or size.get("longest_edge")
    if lowest is None or highest is None:
        raise CheckpointError(f"{path} states no pixel limits.", "copy the image processor files of the base model")
    spec = {key: raw[key] for key in _VISION_KEYS if key in raw}
    return {**spec, "min_pixels": lowest, "max_pixels": highest, "processor": raw.get("image_processor_type")}


def _chat_template(checkpoint: Path) -> str:
    newer = checkpoint / "chat_template.jinja"
    if newer.is_file():
        return newer.read_text(encoding="utf-8")
    template = _json(checkpoint / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{checkpoint} has no chat template.", "copy the tokenizer files of the base model")
    return template


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or broken ({error}).", "copy it from the base model") from error


def fingerprint(contract: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (`cpt_rft.files.canonical_json`).

    >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    True
    """
    return sha256_json(dict(contract))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two contracts, one line a key.

    >>> differences({"limits": {"max_new_tokens": 32}}, {"limits": {"max_new_tokens": 64}})
    ['limits.max_new_tokens: 32 against 64']
    """
    left, right = dict(_flat(one)), dict(_flat(other))
    return [
        f"{key}: {left.get(key, 'absent')} against {right.get(key, 'absent')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, "absent") != right.get(key, "absent")
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

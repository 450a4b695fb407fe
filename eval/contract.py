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

from cpt_rft.config.contracts import CONTRACTS, Decoding, Scorer
from cpt_rft.config.schema import EvaluationConfig
from cpt_rft.errors import CheckpointError
from cpt_rft.files import sha256_json
from cpt_rft.prompts import PRESETS
from cpt_rft.vision import VisionSpec

#: Raised by hand whenever a change to extraction or scoring can change a score.
SCORER_VERSION = 2

Contract = dict[str, Any]


def evaluation_contract(
    checkpoint: Path, config: EvaluationConfig, prompt_preset: str, decoding: Decoding | None = None
) -> Contract:
    """The contract under which `checkpoint` answers.

    Args:
        checkpoint: A Hugging Face directory.
        config: Limits, arithmetic, scorer, and the name of the contract.
        prompt_preset: Name of the prompts.
        decoding: How answers come about, if not as the named contract says.

    Raises:
        CheckpointError: There is no checkpoint, or it lacks its image processor or its chat template.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: there is no such checkpoint directory.", "check the path")
    decoding = decoding or CONTRACTS[config.contract].decoding
    contract: Contract = {
        "vision": asked_vision(checkpoint, config).to_json(),
        "chat_template": hashlib.sha256(_chat_template(checkpoint).encode()).hexdigest(),
        "prompts": {"preset": prompt_preset, **dataclasses.asdict(PRESETS[prompt_preset])},
        "limits": {} if decoding.forced else {"max_new_tokens": config.max_new_tokens},
        "dtype": config.dtype,
    }
    if config.max_prompt_tokens is not None:  # absent rather than null: contracts of before keep their fingerprints
        contract["limits"]["max_prompt_tokens"] = config.max_prompt_tokens
    return contract | (_FORCED if decoding.forced else _written(decoding, config.scorer))


def _written(decoding: Decoding, scorer: Scorer) -> Contract:
    """The terms of an answer that the model writes itself."""
    sampling = {"temperature": decoding.temperature, "samples": decoding.samples, "top_p": decoding.top_p}
    return {
        "decoding": {**sampling, "vision_tokens": "suppressed"},
        "extraction": {"cot": "last balanced box", "direct": "whole stripped response"},
        "scorer": scorer_terms(scorer),
    }


# The terms of the released SFT metric.
_FORCED: Contract = {
    "decoding": {
        "teacher_forced": True,
        "token": "likeliest at each position of the label",
        "vision_tokens": "allowed",
    },
    "extraction": {
        "strict": "label, end token and newline, special tokens left out, stripped, lower case",
        "lenient": "label and end token, special tokens left out, stripped, lower case",
    },
    "scorer": {"preset": "compute_accuracy_vqa", "version": 1},
}


def scorer_terms(scorer: Scorer) -> dict[str, Any]:
    """A contract's section on its scorer."""
    return {"preset": scorer, "version": SCORER_VERSION}


def is_forced(contract: Contract) -> bool:
    """Whether the model was shown the label, so that its scores are for audits only."""
    return bool(contract["decoding"].get("teacher_forced"))


def asked_vision(checkpoint: Path, config: EvaluationConfig) -> VisionSpec:
    """What the model is to see: the checkpoint's own specification with the pixel budget that was asked for."""
    return VisionSpec.read(checkpoint).with_limits(config.min_pixels, config.max_pixels)


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

"""Anybody's checkpoint: what a Hugging Face directory lacks, all of it at once and in words."""

import json
from pathlib import Path

from cpt_rft.errors import CheckpointError
from cpt_rft.vision import NEW_FILE, OLD_FILE

_INDEX = "model.safetensors.index.json"
#: What each file is for.
FILES = {
    "config.json": "the form of the model",
    "generation_config.json": "the tokens that end an answer",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's special tokens",
}


def lacking(directory: Path, *, weights: bool = True) -> list[str]:
    """The files that evaluation needs and that are not there, each with what it is for.

    Args:
        directory: A checkpoint.
        weights: Whether this process is to answer; a server has its own.
    """
    gone = [f"{name} ({what})" for name, what in FILES.items() if not (directory / name).is_file()]
    if not any((directory / name).is_file() for name in (OLD_FILE, NEW_FILE)):
        gone.append(f"{OLD_FILE} (what the model sees of a picture)")
    if not _has_template(directory):
        gone.append("chat_template.jinja (how a question becomes a prompt)")
    return gone + (_weights(directory) if weights else [])


def _has_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    path = directory / "tokenizer_config.json"
    try:
        return path.is_file() and "chat_template" in json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True  # a broken file is told of when it is read


def _weights(directory: Path) -> list[str]:
    if not (directory / _INDEX).is_file():
        found = (directory / "model.safetensors").is_file()
        old = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {old[0]} is an older format, to be saved again with save_pretrained" if old else ""
        return [] if found else [f"model.safetensors (the weights{hint})"]
    try:
        names = sorted(set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return [f"{_INDEX}, whole (which file holds which weight)"]
    return [f"{name} (a part of the weights)" for name in names if not (directory / name).is_file()]


def refuse_unfit(directory: Path, *, weights: bool = True) -> None:
    """Stop before anything is loaded.

    Raises:
        CheckpointError: There is no such directory, or it lacks files; all of them are named.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such checkpoint directory.", "check the path")
    gone = lacking(directory, weights=weights)
    if gone:
        raise CheckpointError(
            f"{directory} cannot be evaluated; missing: {'; '.join(gone)}.",
            "copy the small files from the model that it was trained from, under the same names",
        )

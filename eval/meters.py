"""The files of the meters of forgetting: where a measurement lies, what decides it, whether it is there.

A measurement is a JSON file in ``meters/`` of a stage, beside its records. Its ``key`` is a hash of ``terms``, all that
decides its numbers, the hashes of the models among them; a file with the asked key is kept and never made again.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt_rft.config.schema import DriftConfig, FisherConfig
from cpt_rft.files import read_json, sha256_json, write_json_atomic
from cpt_rft.prompts import Style

METERS = "meters"
#: Raised by hand whenever a change to a meter can change a number.
VERSION = 1
#: Name of each divergence: from where to where. The first named writes the sequences.
PAIRS = ("base_to_model", "model_to_base", "start_to_model", "model_to_start")
#: Updates as a step makes them: SFT on the label; RFT with centred rewards, as in the paper's theory; and as GRPO
#: scales them by the standard deviation of the group. All are means over the tokens of the batch, without a KL penalty.
UPDATES = ("sft", "rft", "grpo")
Json = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """How prompts are put and answered.

    Attributes:
        style: Prompt style.
        preset: Name of the prompts.
        max_new_tokens: Longest completion.
        dtype: Arithmetic of the models.
        batch: Prompts answered together; it can change the last bits.
        device: Where they run; it decides nothing that is hashed.
    """

    style: Style
    preset: str
    max_new_tokens: int
    dtype: str = "float32"
    batch: int = 16
    device: str = "cpu"

    def terms(self) -> Json:
        """All of it that decides a number."""
        return {key: value for key, value in asdict(self).items() if key != "device"} | {"temperature": 1.0}


def drift_path(directory: Path, task: str) -> Path:
    """Where the drift on a task's prompts lies in a directory of meters."""
    return directory / f"drift.{task}.json"


def fisher_path(directory: Path) -> Path:
    """Where the Fisher risk of the updates at a stage's start lies in a directory of meters."""
    return directory / "fisher.json"


def drift_terms(task: str, data: str, models: Mapping[str, str], config: DriftConfig, asking: Asking) -> Json:
    """All that decides the drift on a task's prompts.

    Args:
        task: Whose prompts.
        data: Hash of its rows.
        models: Hash by ``base``, ``start`` and ``model``.
        config: Rows and samples.
        asking: How the prompts are put.
    """
    sizes = {"rows": config.rows, "samples": config.samples}
    return {
        "meter": "drift",
        "version": VERSION,
        "task": task,
        "data": data,
        **sizes,
        **asking.terms(),
        "models": dict(models),
    }


def fisher_terms(
    new: Mapping[str, str], old: Mapping[str, str], start: str, config: FisherConfig, asking: Asking
) -> Json:
    """All that decides the measurement.

    Args:
        new: Hash of the training rows of the stage's tasks.
        old: Hash of the dev rows of the tasks learned before.
        start: Hash of the stage's start.
        config: Sizes.
        asking: How prompts are put.
    """
    sizes = {"rows": config.rows, "group": config.group, "scores": config.scores}
    return {
        "meter": "fisher",
        "version": VERSION,
        "new": dict(new),
        "old": dict(old),
        **sizes,
        **asking.terms(),
        "start": start,
    }


def finished(path: Path, terms: Json) -> Json | None:
    """A measurement that is there and was made on these terms."""
    found = read_json(path)
    return found if found.get("key") == sha256_json(terms) else None


def keep(path: Path, terms: Json, found: Json) -> None:
    """Write a measurement whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {"key": sha256_json(terms), "terms": terms, **found})

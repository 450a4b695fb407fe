"""What every task is: a YAML file, where its rows come from, and how a raw row becomes an `Example`."""

import hashlib
import heapq
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from cpt_rft.config.document import Document
from cpt_rft.config.load import REPOSITORY, validate
from cpt_rft.config.nearest import nearest
from cpt_rft.config.strict import KeyedError
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import IMAGE_TAG, Example, Kind, Split
from cpt_rft.data.reasons import Reason
from cpt_rft.data.source import Source
from cpt_rft.errors import ConfigError, DataError
from cpt_rft.prompts import PRESETS
from cpt_rft.seeds import derive_seed

TASK_FILES = REPOSITORY / "configs" / "tasks"
READERS = (
    "authors",
    "geometry3k",
    "gqa",
    "jigsaw",
    "mmlu_pro",
    "mmmu",
    "pathvqa",
    "pope",
    "scienceqa",
    "superclevr",
    "superclevr_official",
    "textvqa",
    "vizwiz",
)
Options = Mapping[str, str | int | float | bool | None]
DEFAULT_PRESET = "task"
NOT_SAMPLED = "not_sampled"
"""The reason of every row that a stated sample leaves out."""
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What a reader raises at a row that is not of the documented form."""
_SEED_RANGE = 2**63
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Sample(_Strict):
    """Fewer rows than the source has: those whose seeded hash of the row's id is lowest, in the source's order."""

    rows: PositiveInt
    """How many rows stay."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Another seed keeps other rows."""


class Carve(_Strict):
    """A split cut from another one by a seeded hash of the picture: a picture is in one of the two, never in both."""

    from_split: Split
    """The split that gives up rows."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Expected share of its pictures."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Another seed takes other pictures."""


class SplitPrompt(_Strict):
    """A problem that is worded otherwise in training than in testing; dev stands for the test."""

    train: str
    """Wording of the train split."""
    test: str
    """Wording of dev and test."""


class TaskConfig(_Strict):
    """One file of configs/tasks."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]
    """Name of the task; ids of its rows begin with it."""
    reader: str
    """Which file of cpt_rft/tasks reads the raw rows."""
    kind: Kind
    """How answers compare; a reader may say otherwise for single rows."""
    general: bool = False
    """Never trained on: a general ability that is scored beside the tasks."""
    repos: tuple[str, ...] = ()
    """Hub repository, current name first, then older names and copies; the first that answers is used."""
    config: str | None = None
    """Configuration of the repository."""
    revision: str | None = None
    """Commit, branch or tag of the repository; null takes the newest once and locks it."""
    splits: Mapping[Split, str]
    """Name in the source of each of our splits that it has."""
    carve: Mapping[Split, Carve] = {}
    """Splits that the source does not have and that are cut from another one."""
    sample: Mapping[Split, Sample] = {}
    """Splits that are larger than wanted."""
    prompts: Mapping[str, str | SplitPrompt]
    """Wording of the problem a prompt preset, with fields in braces; `task` is the default for both arms."""
    official: Mapping[Split, int] = {}
    """Published row counts, before carving and sampling and without rows dropped for an expected reason."""
    expected_drops: tuple[str, ...] = ()
    """Reasons that belong to the task: these drops are counted and shown but are no fault of the data."""
    options: Options = {}
    """What only this reader understands."""
    licence: str | None = None
    """As the card states it; null where none was found."""
    homepage: str | None = None
    """Where a reader finds the dataset."""
    note: str | None = None
    """What everyone who uses the rows should know; shown with every table of counts."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.reader not in READERS:
            raise KeyedError(("reader",), f"unknown {self.reader!r}, the nearest is {nearest(self.reader, READERS)!r}")
        if DEFAULT_PRESET not in self.prompts:
            raise KeyedError(("prompts",), f"the preset {DEFAULT_PRESET!r} is missing")
        for preset in self.prompts:
            if preset not in PRESETS:
                raise KeyedError(
                    ("prompts",), f"unknown preset {preset!r}, the nearest is {nearest(preset, PRESETS)!r}"
                )
        for split, rule in self.carve.items():
            if split in self.splits or rule.from_split not in self.splits:
                raise KeyedError(("carve", split), "it must be cut from a split of the source and not be one itself")
        return self


@dataclass(frozen=True)
class Raw:
    """What a reader found in one raw row.

    Attributes:
        pictures: Original bytes in the order of their tags; none or empty bytes where one is missing.
        fields: What the prompt's braces stand for, ``question`` among them.
        answer: The label.
        references: Every other accepted answer.
        kind: How this answer compares, if not as the task says.
        rationale: A text that leads to the answer, or none.
        meta: Anything else, JSON-serialisable.
    """

    pictures: tuple[bytes, ...]
    fields: Mapping[str, str]
    answer: str
    references: tuple[str, ...] = ()
    kind: Kind | None = None
    rationale: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A dataset: resolve and download its files, then stream its rows.

    A subclass says which options it has and turns raw rows into examples; ids are
    ``<task>/<source split>/<id or number in the source>``.
    """

    OPTIONS: ClassVar[Options] = {}
    """The options of the reader with their defaults."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    @abstractmethod
    def source(self, cache: Path) -> Source:
        """Resolve the files of every split and download what is not here yet.

        Args:
            cache: Holds what was resolved and a site's archives. Files of the hub lie in the hub's own cache.

        Raises:
            DataError: Not found, renamed, gated, not readable without a script, changed, no space, no network.
        """

    @abstractmethod
    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """Every row of a split, one at a time, pictures as the original bytes.

        A carved split and the split that it is cut from share a source split; each raw row is a row or a drop of
        exactly one of the two.
        """

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that the task has, carved ones included, in the order train, dev, test."""
        order: tuple[Split, ...] = ("train", "dev", "test")
        return tuple(split for split in order if split in self.config.splits or split in self.config.carve)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Every option of the reader, with its default where the configuration says nothing."""
        return dict(self.OPTIONS) | dict(self.config.options)

    def source_split(self, split: Split) -> str:
        """What the source calls the split that holds the rows of ours.

        Raises:
            DataError: The task has no such split.
        """
        origin = self.config.carve[split].from_split if split in self.config.carve else split
        if origin not in self.config.splits:
            raise DataError(f"{self.config.name} has no split {split!r}.", f"use one of {', '.join(self.splits)}")
        return self.config.splits[origin]

    def holds(self, split: Split, picture: str) -> bool:
        """Whether a row of ``source_split(split)`` is in this split rather than in another one cut from the same.

        Args:
            split: Ours.
            picture: What identifies the picture: the sha256 of its bytes or its id in the source.
        """
        origin = self.config.carve[split].from_split if split in self.config.carve else split
        for name in ("test", "dev"):
            rule = self.config.carve.get(name)
            if rule is not None and rule.from_split == origin and _carved(self.config.name, name, rule, picture):
                return name == split
        return split == origin

    def sampled(self, split: Split, keys: Iterable[str]) -> set[str] | None:
        """The keys of a split's rows that its sample keeps, or none if all stay; ``keys`` is then not read."""
        rule = self.config.sample.get(split)
        if rule is None:
            return None
        ranked = ((derive_seed("sample", self.config.name, split, rule.seed, key), key) for key in keys)
        return {key for _, key in heapq.nsmallest(rule.rows, ranked)}

    def row_id(self, split: Split, key: str) -> str:
        """The id of the row with this key in the source."""
        return f"{self.config.name}/{self.source_split(split)}/{key}"

    def converted(self, split: Split, key: str, read: Callable[[], Raw]) -> Example | Drop:
        """The example of a row, or the drop that says why ``read`` could not read it or what it lacks."""
        try:
            raw = read()
        except MALFORMED as error:
            return Drop(self.row_id(split, key), split, Reason.ROW_MALFORMED, f"{type(error).__name__}: {error}")
        return self.row(split, key, raw)

    def left_out(self, split: Split, key: str) -> Drop:
        """The drop of a row that the sample does not keep."""
        return Drop(self.row_id(split, key), split, NOT_SAMPLED, "outside the seeded sample")

    def row(self, split: Split, key: str, raw: Raw) -> Example | Drop:
        """The example of a row, or the drop that says what it lacks."""
        row_id = self.row_id(split, key)
        if any(not picture for picture in raw.pictures):
            return Drop(row_id, split, Reason.PICTURE_MISSING, "no picture, or one of no bytes")
        if not raw.answer.strip():
            return Drop(row_id, split, Reason.ANSWER_EMPTY, repr(raw.answer))
        if not raw.fields["question"].strip():
            return Drop(row_id, split, Reason.ROW_MALFORMED, "the question is empty")
        problems = self._problems(split, raw.fields)
        tags = {text.count(IMAGE_TAG) for text in problems.values()}
        if tags != {len(raw.pictures)}:
            return Drop(row_id, split, Reason.IMAGE_TAGS, f"{sorted(tags)} tags for {len(raw.pictures)} pictures")
        problem = problems[DEFAULT_PRESET]
        others = {preset: text for preset, text in problems.items() if text != problem}
        kind = raw.kind or self.config.kind
        references = tuple(text for text in raw.references if text.strip())
        if kind != "vqa" or raw.answer not in references:  # there, repeats count
            references = tuple(dict.fromkeys((raw.answer, *references)))
        return Example(
            id=row_id,
            task=self.config.name,
            split=split,
            images=raw.pictures,
            image_paths=tuple(picture_path(picture) for picture in raw.pictures),
            problem=problem,
            answer=raw.answer,
            references=references,
            kind=kind,
            rationale=raw.rationale,
            rationale_source="dataset" if raw.rationale else None,
            meta=dict(raw.meta) | ({"problems": others} if others else {}),
        )

    def _problems(self, split: Split, fields: Mapping[str, str]) -> dict[str, str]:
        texts = {}
        for preset, wording in self.config.prompts.items():
            if isinstance(wording, SplitPrompt):
                wording = wording.train if split == "train" else wording.test
            try:
                texts[preset] = wording.format_map(fields)
            except (KeyError, ValueError, IndexError) as error:
                raise ConfigError(
                    f"task {self.config.name}: the prompt {preset!r} cannot be filled in ({error}).",
                    f"its fields are {', '.join(sorted(fields))}, each in one pair of braces",
                ) from error
        return texts


def picture_path(picture: bytes) -> str:
    """A name for a picture that depends on its bytes only: the same picture has the same name in every row."""
    suffix = next((suffix for magic, suffix in _MAGIC.items() if picture.startswith(magic)), "bin")
    return f"{hashlib.sha256(picture).hexdigest()[:32]}.{suffix}"


def _carved(task: str, split: str, rule: Carve, picture: str) -> bool:
    return derive_seed("carve", task, split, rule.seed, picture) < rule.share * _SEED_RANGE


def task_names() -> list[str]:
    """The tasks of configs/tasks, sorted."""
    return sorted(path.stem for path in TASK_FILES.glob("*.yaml"))


def load_task_config(name_or_path: str | Path) -> TaskConfig:
    """Read a task file strictly.

    Raises:
        ConfigError: There is no such task, or a key or value of its file is wrong; with file and line.
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        names = task_names()
        if str(name_or_path) not in names:
            known = nearest(str(name_or_path), names)
            raise ConfigError(f"unknown task {str(name_or_path)!r}, the nearest is {known!r}.", f"use one of {names}")
        path = TASK_FILES / f"{name_or_path}.yaml"
    return validate(TaskConfig, Document.read(path))


def load_task(name_or_path: str | Path) -> Task:
    """The task of a file of configs/tasks, or of any YAML file of that form.

    Raises:
        ConfigError: There is no such task, or a key or value of its file is wrong.
    """
    config = load_task_config(name_or_path)
    reader: type[Task] = importlib.import_module(f"cpt_rft.tasks.{config.reader}").Reader
    for key in config.options:
        if key not in reader.OPTIONS:
            known = ", ".join(reader.OPTIONS) or "none"
            raise ConfigError(f"task {config.name}: unknown option {key!r}.", f"the options here are: {known}")
        default = reader.OPTIONS[key]
        if default is not None and type(config.options[key]) is not type(default):
            problem = f"task {config.name}: the option {key} is {config.options[key]!r}"
            raise ConfigError(f"{problem}.", f"write it like its default, {default!r}")
    return reader(config)

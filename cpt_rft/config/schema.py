"""What an experiment may say. Every object is frozen and refuses keys that it does not know.

The text under a field is its help: it appears in the JSON Schema that editors read (``cpt-rft schema``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cpt_rft.config.contracts import CONTRACTS, ContractName, Scorer
from cpt_rft.config.engine import EngineConfig
from cpt_rft.config.methods import MethodConfig
from cpt_rft.config.nearest import nearest
from cpt_rft.config.strict import KeyedError, Name, Strict, T, check_unique
from cpt_rft.miniature.tasks import GENERAL, TASKS
from cpt_rft.prompts import PRESETS, Style

_HUB = tuple(sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "tasks").glob("*.yaml")))
TASK_NAMES: Mapping[str, tuple[str, ...]] = {"miniature": tuple(TASKS), "hub": _HUB}
GENERAL_NAMES: Mapping[str, tuple[str, ...]] = {"miniature": tuple(GENERAL), "hub": _HUB}


#: Keys of the section `evaluation` that add measurements and change no score.
METER_KEYS = ("drift", "fisher")


class DataConfig(Strict):
    """Which rows."""

    source: Literal["miniature", "hub"] = "miniature"
    """Where tasks come from: the drawn miniature world, or the real datasets (`cpt-rft data prepare`)."""
    directory: str | None = None
    """Of `cpt-rft data prepare`, relative to here or to the repository; only for the source `hub`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawn rows, or of the choice among the prepared ones."""
    train: PositiveInt
    """Training rows a task."""
    dev: PositiveInt
    """Rows a task for every choice (learning rate, steps, matching)."""
    test: PositiveInt
    """Rows a task for published numbers only."""
    general: PositiveInt = 100
    """Rows a general ability, in dev and in test."""
    at_most: bool = False
    """Take all rows where a prepared task has fewer than that; otherwise it is refused. Only for the source `hub`."""
    prompt_preset: str = "miniature"
    """Which prompt suffixes (cpt_rft/prompts.py)."""

    @model_validator(mode="after")
    def _directory_belongs_to_the_hub(self) -> Self:
        if (self.directory is None) == (self.source == "hub"):
            words = "the source 'hub' needs the directory" if self.source == "hub" else "only the source 'hub' has one"
            raise KeyedError(("directory",), words)
        if self.at_most and self.source != "hub":
            raise KeyedError(("at_most",), "drawn rows never run out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_drawn_rows_lack(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key not in ("directory", "at_most") or value}

    @field_validator("prompt_preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown prompt preset {value!r}, the nearest is {nearest(value, PRESETS)!r}")
        return value


class DriftConfig(Strict):
    """The drift meter (docs/meters.md): how far each stage moves the model, in nats."""

    rows: Annotated[int, Field(ge=2)] = 16
    """Dev prompts a task; intervals are over prompts, so at least two."""
    samples: PositiveInt = 4
    """Sequences a prompt, sampled at temperature 1."""


class FisherConfig(Strict):
    """The Fisher meter (docs/meters.md): how much an SFT and an RFT update from a stage's start risk on old tasks."""

    rows: Annotated[int, Field(ge=2)] = 16
    """Training prompts of the stage's task; both updates are made on them."""
    group: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt of the RFT update."""
    scores: Annotated[int, Field(ge=2)] = 64
    """Dev prompts of the old tasks together, one sampled answer each, that estimate the Fisher information."""


class EvaluationConfig(Strict):
    """How every checkpoint is scored."""

    split: Literal["dev", "test"] = "test"
    """Which rows are scored; choices are made on dev only."""
    rows: PositiveInt | None = None
    """Score only the first so many rows a task; null for all."""
    styles: Annotated[tuple[Style, ...], Field(min_length=1)] = ("cot", "direct")
    """Prompt styles in which every cell is scored."""
    batch_size: PositiveInt = 50
    """Rows generated and committed together. It can change the last bits, so it belongs to the run."""
    max_new_tokens: PositiveInt
    """Longest answer in tokens; the `paper` contract fills in 1024."""
    max_prompt_tokens: PositiveInt | None = None
    """A row with a longer prompt, picture tokens included, is refused; null for no limit, `paper` fills in 6144."""
    min_pixels: PositiveInt | None = None
    """Least area of a picture as the model sees it; null for the checkpoint's own, `paper` fills in 262144."""
    max_pixels: PositiveInt | None = None
    """Largest area of a picture as the model sees it; null for the checkpoint's own, `paper` fills in 4194304."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model that answers; part of the contract, so that machines agree."""
    general: tuple[str, ...] = ()
    """Held-out abilities, scored but never trained on."""
    contract: ContractName = "greedy"
    """Decoding: `greedy`, the likeliest token each time; `paper`, one sample at temperature 0.5 with the limits of the
    released scripts; `teacher_forced`, the released SFT metric, which shows the model the label (audits only)."""
    scorer: Scorer = "official"
    """What counts as right: `official`, or `paper_single_label` (the released reward)."""
    base_samples: Annotated[int, Field(ge=0)] = 8
    """Samples a row at temperature 1 for the base model's row; 0 for none."""
    drift: DriftConfig | None = None
    """Measure how far each stage moves the model; null for off. No score depends on it."""
    fisher: FisherConfig | None = None
    """Measure the Fisher risk of both kinds of update at each stage's start; null for off. No score depends on it."""

    @model_serializer(mode="wrap")
    def _without_meters_that_are_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key not in METER_KEYS or value is not None}

    @model_validator(mode="before")
    @classmethod
    def _contract_fills_in(cls, stated: Any) -> Any:
        if not isinstance(stated, Mapping):
            return stated
        name = stated.get("contract")
        fills = CONTRACTS[name].fills if isinstance(name, str) and name in CONTRACTS else {}
        # What a validator has touched is no JSON any more, in which a list may stand for a tuple.
        return {**fills, **{key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}}

    @field_validator("styles", "general")
    @classmethod
    def _no_repeats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_unique(value)


class Experiment(Strict):
    """A study: which model learns which tasks, by which methods, in which orders, from which seeds."""

    name: Name
    """Name of the study; it is part of every seed."""
    base_model: str
    """Directory of the base checkpoint, relative to here or to the repository."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks in the order of learning (order 0)."""
    orders: tuple[tuple[str, ...], ...] = ()
    """Further orders, each a permutation of `tasks`; they become order 1, 2, ..."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Training seeds; each gives one sequence a method and order."""
    methods: Annotated[Mapping[str, MethodConfig], Field(min_length=1)]
    """Methods: a list of names of configs/methods/*.yaml, or names with changes to them."""
    engine: EngineConfig
    """What trains: a name of configs/engines/*.yaml, or changes to one."""
    rft_engine: EngineConfig | None = None
    """What trains the methods of the kind grpo, where that is another engine; null for `engine`."""
    data: DataConfig
    """Source, seed and number of the rows."""
    evaluation: EvaluationConfig
    """What every checkpoint is scored on, and how."""
    output: str
    """Run directory, relative to where the command is given."""
    workers: Literal["auto"] | PositiveInt = "auto"
    """Sequences trained side by side; `auto` uses the cores and the memory there are."""

    @property
    def all_orders(self) -> tuple[tuple[str, ...], ...]:
        """Every order, `tasks` first."""
        return (self.tasks, *self.orders)

    @property
    def engines(self) -> dict[str, EngineConfig]:
        """Every engine of the experiment, by its key."""
        return {"engine": self.engine} | ({} if self.rft_engine is None else {"rft_engine": self.rft_engine})

    def engine_for(self, method: MethodConfig) -> EngineConfig:
        """What trains a method."""
        return self.engine if self.rft_engine is None or method.kind != "grpo" else self.rft_engine

    @property
    def cores(self) -> int:
        """Cores that one worker keeps busy."""
        return max(engine.cores for engine in self.engines.values())

    @property
    def asked_workers(self) -> Literal["auto"] | int:
        """Sequences side by side; one by default where an engine takes the whole machine."""
        outside = any(engine.name != "local" for engine in self.engines.values())
        return 1 if self.workers == "auto" and outside else self.workers

    @model_serializer(mode="wrap")
    def _without_a_second_engine(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "rft_engine" or value is not None}

    @field_validator("tasks", "seeds")
    @classmethod
    def _no_repeats(cls, value: tuple[T, ...]) -> tuple[T, ...]:
        return check_unique(value)

    @model_validator(mode="after")
    def _methods_write_their_answers(self) -> Self:
        if CONTRACTS[self.evaluation.contract].decoding.forced:
            raise KeyedError(
                ("evaluation", "contract"),
                "under teacher_forced the model is shown the label, so no methods may be compared; see 'cpt-rft audit'",
            )
        return self

    @model_validator(mode="after")
    def _sources_of_rollouts_fit(self) -> Self:
        for name, method in self.methods.items():
            if method.learns_from is not None:
                at = ("methods", name, "rollouts", "from_method")
                _check_source(name, method, self.methods, at)
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        source = self.data.source
        _check_known("task", self.tasks, TASK_NAMES[source], at=("tasks",))
        _check_known("general ability", self.evaluation.general, GENERAL_NAMES[source], at=("evaluation", "general"))
        if source == "hub" and self.evaluation.general and self.evaluation.split != "test":
            raise KeyedError(("evaluation", "general"), "general abilities of the hub have no dev rows")
        every = [name for names in TASK_NAMES.values() for name in names]  # a method may serve several studies
        for name, method in self.methods.items():
            for task in method.task_epochs:
                _check_known("task", [task], every, at=("methods", name, "task_epochs", task))
        for index, order in enumerate(self.orders):
            if sorted(order) != sorted(self.tasks):
                raise KeyedError(("orders", index), f"{list(order)} is not a permutation of the tasks")
            if order in self.all_orders[: index + 1]:
                raise KeyedError(("orders", index), f"{list(order)} is listed twice (the tasks themselves are order 0)")
        return self


def _check_known(noun: str, values: Sequence[str], known: Sequence[str], *, at: tuple[str | int, ...]) -> None:
    for index, value in enumerate(values):
        if value not in known:
            where = at if at[-1:] == (value,) else (*at, index)
            raise KeyedError(where, f"unknown {noun} {value!r}, the nearest is {nearest(value, known)!r}")


def _check_source(
    name: str, method: MethodConfig, methods: Mapping[str, MethodConfig], at: tuple[str | int, ...]
) -> None:
    """That what a method learns from is in the experiment, comes before it, and is asked in the same way."""
    passed, source = [name], method.learns_from
    while source is not None:
        if source not in methods:
            words = f"{source!r} is no method of the experiment, the nearest is {nearest(source, methods)!r}"
            raise KeyedError(at, f"{words}; list it in methods")
        if source in passed:
            raise KeyedError(at, f"{' learns from '.join([*passed, source])}: none can be the first")
        passed.append(source)
        source = methods[source].learns_from
    first = methods[passed[1]]
    if first.joint != method.joint:
        raise KeyedError(at, f"{first.name} and {name} have other stages (joint: {first.joint} and {method.joint})")
    if first.style != method.style:
        raise KeyedError(at, f"{first.name} answers in the style {first.style}; write style: {first.style} here too")

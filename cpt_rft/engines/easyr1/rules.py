"""The rules that EasyR1's settings must keep, checked before Ray starts.

The framework itself finds most of these mistakes after Ray, tokenizer, data and model are loaded, some never: an
unknown loss is the default one, a path that does not exist becomes null. Source of each rule: hiyouga/EasyR1@b44b311,
at the place that its ``where`` names.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cpt_rft.config.nearest import nearest
from cpt_rft.errors import ConfigError
from cpt_rft.files import read_json

SCHEMA = Path(__file__).with_name("schema.json")
Values = Mapping[str, Any]
Found = str | None
_ACTOR = "worker.actor"
_TYPES: Mapping[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: What must hold, in the framework's keys.
        broken: Given all values and the number of training rows, the values that break it; none if it holds.
        where: The place in the framework that would fail, or that goes on with something else.
        fix: What to change, in the keys of an experiment.
    """

    text: str
    broken: Callable[["Sizes"], Found]
    where: str
    fix: str


@dataclass(frozen=True)
class Sizes:
    """The numbers that the rules are about.

    Attributes:
        values: Every key of the schema with its value.
        rows: Training rows; none where they are not known yet.
    """

    values: Values
    rows: int | None = None

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def gpus(self) -> int:
        """Workers on all nodes."""
        return int(self["trainer.nnodes"] * self["trainer.n_gpus_per_node"])

    @property
    def prompts(self) -> int:
        """Prompts of a rollout."""
        return int(self["data.rollout_batch_size"])

    @property
    def generated(self) -> int:
        """Prompts of one call of the generation."""
        return int(self["data.mini_rollout_batch_size"] or self.prompts)

    @property
    def completions(self) -> int:
        """Completions of a rollout."""
        return self.prompts * int(self["worker.rollout.n"])

    @property
    def step(self) -> int:
        """Completions of an optimizer step."""
        return int(self[f"{_ACTOR}.global_batch_size"] * self["worker.rollout.n"])

    @property
    def share(self) -> int:
        """Completions of an optimizer step on one GPU."""
        return self.step // (self.gpus // int(self[f"{_ACTOR}.ulysses_size"]))


def check(settings: Mapping[str, Any], rows: int | None = None, *, planned: bool = False) -> None:
    """Refuse settings that EasyR1 would refuse late, or would take for something else.

    Args:
        settings: Of `cpt_rft.engines.easyr1.native.settings`, nested.
        rows: Training rows in the file; none where they are not written yet.
        planned: For a plan, which names files that are still to be written.

    Raises:
        ConfigError: A key is unknown, a value of the wrong kind, or a rule is broken; for the first thing found.
    """
    flat = dict(flattened(settings))
    for key, value in flat.items():
        _check_key(key, value)
    sizes = Sizes({**{key: entry["default"] for key, entry in schema().items()}, **flat}, rows)
    for rule in RULES:
        found = None if planned and rule.broken is _paths else rule.broken(sizes)
        if found is not None:
            raise ConfigError(f"EasyR1 needs {rule.text}, but {found} ({rule.where}).", rule.fix)


@cache
def schema() -> Mapping[str, Mapping[str, Any]]:
    """Type, default and allowed values of every key that a user of the framework may set."""
    keys: Mapping[str, Mapping[str, Any]] = json.loads(SCHEMA.read_text(encoding="utf-8"))["keys"]
    return keys


def flattened(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted keys; what the schema has as a mapping stays one.

    >>> dict(flattened({"worker": {"rollout": {"n": 8, "val_override_config": {"n": 1}}}}))
    {'worker.rollout.n': 8, 'worker.rollout.val_override_config': {'n': 1}}
    """
    for name, value in settings.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and key not in schema():
            yield from flattened(value, f"{key}.")
        else:
            yield key, value


def _check_key(key: str, value: Any) -> None:
    """The key is one that the framework has, and takes such a value."""
    if key not in schema():
        raise ConfigError(
            f"EasyR1 has no key {key!r} that may be set, the nearest is {nearest(key, schema())!r}.",
            "rename or remove it",
        )
    entry = schema()[key]
    if not _fits(value, entry["type"]):
        raise ConfigError(f"EasyR1's key {key} takes {entry['type']}, not {value!r}.", "change the value")
    allowed = entry.get("allowed")
    given = value if isinstance(value, list) else [value]
    if allowed is not None and value is not None and not all(each in allowed for each in given):
        words = ", ".join(json.dumps(each) for each in allowed)
        raise ConfigError(f"EasyR1's key {key} takes {words}, not {json.dumps(value)}.", "use one of them")


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of a kind that the schema names."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind.removeprefix("Optional[").removesuffix("]"))
    if kind.startswith("dict"):
        return isinstance(value, Mapping)
    if kind.startswith("tuple"):
        return isinstance(value, list) and len(value) == 2 and all(_fits(each, "float") for each in value)
    if kind.startswith("Tuple"):
        return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


# --- what each rule looks at -----------------------------------------------------------------------------------------


def _divides(number: Callable[[Sizes], int], parts: Callable[[Sizes], int]) -> Callable[[Sizes], Found]:
    """That a number divides evenly into parts."""

    def broken(sizes: Sizes) -> Found:
        whole, part = number(sizes), parts(sizes)
        if part > 0 and whole % part == 0:
            return None
        return f"{whole} divided by {part} leaves {whole % part}" if part > 0 else f"the divisor is {part}"

    return broken


def _key(name: str) -> Callable[[Sizes], int]:
    return lambda sizes: int(sizes[name])


def _positive(sizes: Sizes) -> Found:
    keys = [key for key in _POSITIVE if sizes[key] is not None and sizes[key] <= 0]
    return f"{keys[0]} is {sizes[keys[0]]}" if keys else None


_POSITIVE = (
    *("trainer.nnodes", "trainer.n_gpus_per_node", "trainer.total_epochs", "worker.rollout.n"),
    *("data.rollout_batch_size", "data.mini_rollout_batch_size", "data.max_prompt_length", "data.max_response_length"),
    *(f"{_ACTOR}.global_batch_size", f"{_ACTOR}.micro_batch_size_per_device_for_update", f"{_ACTOR}.ppo_epochs"),
    *(f"{_ACTOR}.micro_batch_size_per_device_for_experience", "worker.rollout.tensor_parallel_size"),
    *("worker.rollout.temperature", "worker.rollout.gpu_memory_utilization", "worker.rollout.top_p"),
    *(f"{_ACTOR}.max_grad_norm", f"{_ACTOR}.optim.lr", "worker.reward.num_cpus"),
)


def _paths(sizes: Sizes) -> Found:
    missing = [(key, path) for key, path in _named_paths(sizes) if not Path(path).exists()]
    return f"{missing[0][0]} is {missing[0][1]}, which does not" if missing else None


def _named_paths(sizes: Sizes) -> Iterator[tuple[str, str]]:
    """Every path that must be there, by its key."""
    plain = ("data.format_prompt", "data.image_dir", "data.override_chat_template", "trainer.load_checkpoint_path")
    for key in (*plain, f"{_ACTOR}.model.tokenizer_path"):
        if sizes[key] is not None:
            yield key, sizes[key]
    yield f"{_ACTOR}.model.model_path", sizes[f"{_ACTOR}.model.model_path"] or "null"
    for key in ("data.train_files", "data.val_files"):
        yield key, sizes[key].partition("@")[0]
    function = sizes["worker.reward.reward_function"] or "null"
    yield "worker.reward.reward_function", function.rpartition(":")[0] or function


def _one_split(sizes: Sizes) -> Found:
    many = [sizes[key] for key in ("data.train_files", "data.val_files") if sizes[key].count("@") != 1]
    return f"the path is {many[0]}" if many else None


def _resume_name(sizes: Sizes) -> Found:
    path = sizes["trainer.load_checkpoint_path"]
    if path is None:
        return None
    before, word, number = path.rstrip("/").partition("global_step_")
    right = word and number.isdigit() and before.endswith("/")
    return None if right else f"the path is {path}"


def _batched(sizes: Sizes) -> Found:
    longest = sizes["data.max_prompt_length"] + sizes["data.max_response_length"]
    room = sizes["worker.rollout.max_num_batched_tokens"]
    return None if room >= longest else f"{room} is less than {longest}"


def _group(sizes: Sizes) -> Found:
    estimator, n = sizes["algorithm.adv_estimator"], sizes["worker.rollout.n"]
    return f"{estimator} has {n}" if n < 2 and estimator in ("grpo", "rloo", "grpo_passk") else None


def _working(sizes: Sizes) -> Found:
    return "it is gae" if sizes["algorithm.adv_estimator"] == "gae" else None


def _penalty(sizes: Sizes) -> Found:
    return "it is full" if sizes["algorithm.kl_penalty"] == "full" else None


def _tries(sizes: Sizes) -> Found:
    most, tries = sizes["trainer.max_try_make_batch"], math.ceil(sizes.prompts / sizes.generated)
    return f"it takes {tries} and may take {most}" if 0 < most < tries else None


def _experience(sizes: Sizes) -> Found:
    if sizes[f"{_ACTOR}.dynamic_batching"]:
        return None
    share, size = sizes.completions // sizes.gpus, sizes[f"{_ACTOR}.micro_batch_size_per_device_for_experience"]
    return None if share % size == 0 else f"{share} divided by {size} leaves {share % size}"


def _accumulates(sizes: Sizes) -> Found:
    size = sizes[f"{_ACTOR}.micro_batch_size_per_device_for_update"]
    if not sizes[f"{_ACTOR}.fsdp.enable_cpu_offload"] or sizes.share == size:
        return None
    return f"a step has {sizes.share} and a micro-batch {size}"


def _bounds(sizes: Sizes) -> Found:
    low, high, dual = (sizes[f"{_ACTOR}.clip_ratio_{name}"] for name in ("low", "high", "dual"))
    return None if 0 <= low <= 1 and high >= 0 and dual > 1 else f"they are {low}, {high} and {dual}"


def _shares(sizes: Sizes) -> Found:
    keys = ("worker.rollout.gpu_memory_utilization", "worker.rollout.top_p")
    over = [key for key in keys if sizes[key] > 1]
    return f"{over[0]} is {sizes[over[0]]}" if over else None


def _enough_rows(sizes: Sizes) -> Found:
    if sizes.rows is None or sizes.rows >= sizes.generated:
        return None
    return f"there are {sizes.rows} rows for {sizes.generated}"


def _kept(sizes: Sizes) -> Found:
    limit, least = sizes["trainer.save_limit"], 2 if sizes["trainer.val_freq"] > 0 else 3
    return f"it is {limit}" if 0 < limit < least else None


def _resumable(sizes: Sizes) -> Found:
    return "it is true" if sizes["trainer.save_model_only"] else None


def _sequence(sizes: Sizes) -> Found:
    size = sizes[f"{_ACTOR}.ulysses_size"]
    return None if size == 1 else f"it is {size}"


def _heads(sizes: Sizes) -> Found:
    """VLLM cuts the attention heads into equal parts, and key-value heads into equal parts or whole copies."""
    size = sizes["worker.rollout.tensor_parallel_size"]
    config = read_json(Path(sizes[f"{_ACTOR}.model.model_path"]) / "config.json")
    text = config.get("text_config") or config  # older files are flat
    heads, keys = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if heads is None or keys is None:
        return None
    cut = heads % size == 0 and (keys % size == 0 or size % keys == 0)
    return None if cut else f"{size} parts of {heads} heads and {keys} key-value heads are not equal"


_PROCESSES = "change engine.processes or engine.nodes, or the prompts of the method"
RULES: tuple[Rule, ...] = (
    Rule("sizes and rates above 0", _positive, "its loops and buffers", "write a positive number"),
    Rule("exactly one '@' in a data path", _one_split, "RLHFDataset", "choose a run directory without an '@'"),
    Rule("paths that exist", _paths, "get_abs_path would go on with null", "give the same command again"),
    Rule("load_checkpoint_path to end in global_step_N", _resume_name, "RayPPOTrainer", "name such a directory"),
    Rule(
        "clip_ratio_low from 0 to 1, clip_ratio_high from 0, clip_ratio_dual above 1",
        _bounds, "compute_policy_loss takes the logarithm", "change clip_low, clip_high or dual_clip",
    ),
    Rule("gpu_memory_utilization and top_p of at most 1", _shares, "vLLM", "write a share"),
    Rule("adv_estimator to be one that works", _working, "compute_gae_advantage_return", "choose another"),
    Rule("kl_penalty to be one of single log-probabilities", _penalty, "compute_kl", "choose another kl_estimator"),
    Rule("rollout.n above 1 for grpo and rloo", _group, "RayPPOTrainer", "write group: 2 or more"),
    Rule("ulysses_size to be 1", _sequence, "it breaks on pictures", "write 1"),
    Rule(
        "rollout_batch_size % global_batch_size == 0",
        _divides(lambda s: s.prompts, _key(f"{_ACTOR}.global_batch_size")), "RayPPOTrainer",
        "a rollout is prompts_per_step x rollout_steps prompts, a step prompts_per_step",
    ),
    Rule(
        "rollout_batch_size * n % micro_batch_size_per_device_for_experience == 0",
        _divides(lambda s: s.completions, _key(f"{_ACTOR}.micro_batch_size_per_device_for_experience")),
        "RayPPOTrainer", "change engine.micro_batch_experience",
    ),
    Rule(
        "prompts of a generation call % GPUs == 0",
        _divides(lambda s: s.generated, lambda s: s.gpus), "DataProto.chunk, first step", _PROCESSES,
    ),
    # With it and the first of these, what DataProto.chunk and DataProto.split demand of a rollout holds too.
    Rule(
        "global_batch_size * n % GPUs == 0",
        _divides(lambda s: s.step, lambda s: s.gpus), "FSDPWorker would round, and make other steps", _PROCESSES,
    ),
    Rule(
        "global_batch_size * n / GPUs % micro_batch_size_per_device_for_update == 0",
        _divides(lambda s: s.share, _key(f"{_ACTOR}.micro_batch_size_per_device_for_update")), "FSDPWorker",
        "change engine.micro_batch_update",
    ),
    Rule(
        "without dynamic_batching rollout_batch_size * n / GPUs % micro_batch_size_per_device_for_experience == 0",
        _experience, "DataProto.split, first step", "change engine.micro_batch_experience",
    ),
    Rule(
        "fsdp.enable_cpu_offload only without gradient accumulation", _accumulates, "FSDPWorker", "use engine.offload",
    ),
    Rule(
        "GPUs % tensor_parallel_size == 0",
        _divides(lambda s: s.gpus, _key("worker.rollout.tensor_parallel_size")), "FSDPWorker",
        "change engine.tensor_parallel",
    ),
    Rule("heads that tensor_parallel_size divides", _heads, "vLLM", "change engine.tensor_parallel"),
    Rule(
        "max_num_batched_tokens >= max_prompt_length + max_response_length", _batched, "vLLMRollout",
        "raise it, or lower max_prompt_tokens or max_new_tokens",
    ),
    Rule(
        "rollout_batch_size / mini_rollout_batch_size <= max_try_make_batch", _tries, "the first step", "raise it",
    ),
    Rule("save_limit of 3 or more (2 with validation)", _kept, "remove_obsolete_ckpt, before it saves", "write 3"),
    Rule("save_model_only to be false", _resumable, "such a checkpoint cannot be resumed", "write false"),
    Rule(
        "as many rows as a rollout has prompts", _enough_rows, "create_dataloader drops what is not full",
        "use more rows or epochs, or smaller prompts_per_step x rollout_steps",
    ),
)  # fmt: skip

"""What a plan says about the engine easyr1: its command, memory, disk and time, after its rules were checked."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.config.schema import Experiment
from cpt_rft.errors import UserError
from cpt_rft.sequence.plan import Chain, StagePlan
from cpt_rft.sequence.sizes import gib, rows_and_tokens

SMALLEST = 1_000_000_000  # weights; the published rates say nothing of smaller models
Json = dict[str, Any]


def easyr1_plan(experiment: Experiment, engine: EasyR1Config, chains: Sequence[Chain], base: Path) -> Json:
    """The native command of every stage, and what the stages take.

    Args:
        experiment: The study.
        engine: How to compute.
        chains: The chains that it trains.
        base: Directory of the base checkpoint, which may be missing.

    Raises:
        ConfigError: EasyR1 cannot train a method, or not on so many GPUs.
    """
    from cpt_rft.engines.easyr1.cluster import Demand
    from cpt_rft.engines.easyr1.machine import environment_of, planned
    from cpt_rft.engines.easyr1.native import shown, world

    engine = planned(engine)
    for chain in chains:
        check_chain(engine, chain, base)
    try:
        environment = str(environment_of(engine))
    except UserError as error:
        environment = f"missing: {error.fix}"
    demand = Demand.of(engine)
    result: Json = {
        "environment": environment,
        "gpus": world(engine) if engine.device == "cuda" else 0,
        "nodes": engine.nodes,
        "cpus": demand.cpus,
        "commands": {
            f"{chain.label} {stage.index}_{stage.name}": shown(engine, stage.partial / engine.name)
            for chain in chains
            for stage in chain.stages
        },
    }
    return result | (_sizes(experiment, engine, chains, base) if base.is_dir() else {})


def check_chain(engine: EasyR1Config, chain: Chain, base: Path) -> None:
    """That EasyR1 can train a chain, by every rule but that its files exist.

    Args:
        engine: How to compute, ``auto`` resolved.
        chain: The chain.
        base: Directory of the base checkpoint, which may be missing.

    Raises:
        ConfigError: It cannot.
    """
    from cpt_rft.engines.easyr1.methods import supported_method
    from cpt_rft.engines.easyr1.native import Files, settings
    from cpt_rft.engines.easyr1.rules import check
    from cpt_rft.vision import VisionSpec

    method, stage = supported_method(chain.method), chain.stages[0]
    spec = VisionSpec.read(base) if base.is_dir() else VisionSpec(min_pixels=1, max_pixels=1)
    limited = spec.with_limits(*engine.pixel_limits)
    check(settings(engine, method, Files.of(stage.partial / engine.name, base), limited, chain.seed), planned=True)


def _sizes(experiment: Experiment, engine: EasyR1Config, chains: Sequence[Chain], base: Path) -> Json:
    from cpt_rft.engines.easyr1.estimate import checkpoint_bytes, memory, published_rate, work_bytes
    from cpt_rft.engines.easyr1.methods import supported_method
    from cpt_rft.engines.llamafactory.estimate import Shape
    from cpt_rft.vision import VisionSpec

    shape, spec = Shape.read(base), VisionSpec.read(base).with_limits(*engine.pixel_limits)
    needs = [memory(engine, supported_method(chain.method), shape, spec) for chain in chains]
    weights, optimizer = checkpoint_bytes(engine, shape)
    stages = [(chain, stage) for chain in chains for stage in chain.stages]
    times = (
        {}
        if engine.device == "cpu" or shape.params < SMALLEST
        else {
            "tokens_a_second_and_gpu": published_rate(shape),
            "seconds": {
                f"{chain.label} {stage.index}_{stage.name}": _seconds(experiment, engine, chain, stage, shape)
                for chain, stage in stages
            },
        }
    )
    return {
        "weights": shape.params,
        **{f"{key}_bytes": max(asdict(need)[key] for need in needs) for key in asdict(needs[0])},
        "vllm_share": engine.gpu_memory_utilization,
        "checkpoint_weights_bytes": weights,
        "checkpoint_optimizer_bytes": optimizer,
        "work_bytes": work_bytes(engine, shape),
        **times,
    }


def _seconds(experiment: Experiment, engine: EasyR1Config, chain: Chain, stage: StagePlan, shape: Any) -> int:
    from cpt_rft.engines.easyr1.estimate import seconds
    from cpt_rft.engines.easyr1.methods import supported_method

    rows, tokens = rows_and_tokens(experiment.data, stage.tasks, "train", experiment.data.train)
    epochs = chain.method.epochs_of(stage.tasks)
    return seconds(engine, supported_method(chain.method), shape, rows * epochs, tokens * epochs)


def easyr1_lines(native: Json) -> Iterator[str]:
    """The same for the terminal, without the commands."""
    where = f"{native['gpus']} GPUs on {native['nodes']} nodes" if native["gpus"] else "no GPU"
    yield f"EasyR1: {where}, {native['cpus']} CPUs of Ray; {native['environment']}"
    if "weights" not in native:
        return
    if native["gpus"]:
        yield (
            f"memory a GPU, at most: in the update {gib(native['state_bytes'])} for weights, gradients, optimizer and"
            f" reference and {gib(native['update_bytes'])} for activations; while the model writes"
            f" {gib(native['waiting_bytes'])} beside vLLM's share of {native['vllm_share']:.0%}, which must hold"
            f" {gib(native['writing_bytes'])} of weights and its cache"
        )
    yield (
        f"memory a machine: {gib(native['machine_bytes'])} for weights; disk of a stage in work:"
        f" {gib(native['work_bytes'])}, its checkpoints {gib(native['checkpoint_weights_bytes'])} of weights and"
        f" {gib(native['checkpoint_optimizer_bytes'])} of optimizer each until they are merged"
    )
    if "seconds" in native:
        hours = sum(native["seconds"].values()) / 3600
        yield (
            f"time: at most about {hours:,.0f} hours, every completion in full length, at the"
            f" {native['tokens_a_second_and_gpu']:,} tokens a second and GPU that EasyR1 publishes for H100"
        )

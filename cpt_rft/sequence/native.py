"""What a plan says about engines with a command of their own: that command, memory and disk."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import EasyR1Config, LlamaFactoryConfig, LocalConfig
from cpt_rft.config.methods import SftMethod
from cpt_rft.config.schema import Experiment
from cpt_rft.errors import UserError
from cpt_rft.sequence.native_easyr1 import easyr1_lines, easyr1_plan
from cpt_rft.sequence.plan import Chain
from cpt_rft.sequence.sizes import gib

Json = dict[str, Any]


def native_plan(experiment: Experiment, chains: Sequence[Chain], base: Path) -> dict[str, Json]:
    """By engine, the native command of every stage, and what one stage takes; nothing for the engine ``local``.

    Raises:
        ConfigError: An engine cannot train a method, or not with so many processes.
    """
    result: dict[str, Json] = {}
    for engine in experiment.engines.values():
        own = [chain for chain in chains if experiment.engine_for(chain.method) is engine]
        if own and isinstance(engine, LlamaFactoryConfig):
            result[engine.name] = _llamafactory(engine, own, base)
        elif own and isinstance(engine, EasyR1Config):
            result[engine.name] = easyr1_plan(experiment, engine, own, base)
        elif isinstance(engine, LocalConfig) and engine.deepspeed != "none":
            from cpt_rft.engines.local.zero import refuse_whole_weights

            for chain in own:
                refuse_whole_weights(engine, chain.method)
    return result


def native_lines(native: Mapping[str, Json]) -> Iterator[str]:
    """The same for the terminal."""
    if "llamafactory" in native:
        yield from _llamafactory_lines(native["llamafactory"])
    if "easyr1" in native:
        yield from easyr1_lines(native["easyr1"])
    for plan in native.values():
        for stage, command in plan["commands"].items():
            yield f"{stage}: {command}"


def _llamafactory(engine: LlamaFactoryConfig, chains: Sequence[Chain], base: Path) -> Json:
    from cpt_rft.engines.environment import find_environment
    from cpt_rft.engines.llamafactory.engine import planned, supported_method
    from cpt_rft.engines.llamafactory.native import accumulation, shown, world

    engine = planned(engine)
    methods = {chain.method.name: supported_method(chain.method) for chain in chains}
    try:
        environment = str(find_environment(engine.name, engine.environment))
    except UserError as error:
        environment = f"missing: {error.fix}"
    result: Json = {
        "environment": environment,
        "processes": world(engine),
        "gradient_accumulation": {name: accumulation(engine, method) for name, method in methods.items()},
        "commands": {
            f"{chain.label} {stage.index}_{stage.name}": shown(engine, stage.partial / engine.name)
            for chain in chains
            for stage in chain.stages
        },
    }
    return result | (_sizes(engine, methods, base) if base.is_dir() else {})


def _sizes(engine: LlamaFactoryConfig, methods: Mapping[str, SftMethod], base: Path) -> Json:
    from cpt_rft.engines.llamafactory.estimate import Shape, activation_bytes, state_bytes, work_bytes
    from cpt_rft.vision import VisionSpec

    shape = Shape.read(base)
    spec = VisionSpec.read(base).with_limits(engine.min_pixels, engine.max_pixels)
    rows = max(method.micro_batch for method in methods.values())
    picture = min(spec.max_pixels // spec.factor**2, engine.cutoff_len)
    gpu, machine = state_bytes(engine, shape)
    return {
        "weights": shape.params,
        "gpu_state_bytes": gpu,
        "gpu_activation_bytes": activation_bytes(engine, shape, rows * engine.cutoff_len, rows * picture),
        "machine_state_bytes": machine,
        "work_bytes": work_bytes(engine, shape),
    }


def _llamafactory_lines(native: Json) -> Iterator[str]:
    shares = ", ".join(f"{name} {count}" for name, count in native["gradient_accumulation"].items())
    yield f"LLaMA-Factory: {native['processes']} processes, gradient accumulation {shares}; {native['environment']}"
    if "weights" in native:
        state, activation = native["gpu_state_bytes"], native["gpu_activation_bytes"]
        yield (
            f"memory a GPU: about {gib(state)} for weights, gradients and optimizer (DeepSpeed's own estimate) and at"
            f" most {gib(activation)} for activations (rows of engine.cutoff_len);"
            f" memory a machine: about {gib(native['machine_state_bytes'])}"
        )

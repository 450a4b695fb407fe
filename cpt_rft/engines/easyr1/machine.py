"""What ``auto`` means for this engine: this machine, or the machines of a cluster."""

from pathlib import Path

import torch
from pydantic import ValidationError

from cpt_rft.config.engine import EasyR1Config, EngineConfig
from cpt_rft.engines.environment import find_environment
from cpt_rft.engines.local.runtime import resolve as resolve_device
from cpt_rft.engines.local.runtime import resolve_processes
from cpt_rft.errors import ConfigError

NAME = "easyr1"


def environment_of(engine: EasyR1Config) -> Path:
    """The environment that the engine's device needs: where there is no GPU it has no vLLM.

    Raises:
        ConfigError: It is not there.
    """
    return find_environment(NAME, engine.environment, lock=lock_name(engine))


def lock_name(engine: EasyR1Config) -> str:
    """Name of the lock of that environment."""
    return f"{NAME}_cpu" if engine.device == "cpu" else NAME


def resolve(config: EngineConfig) -> EngineConfig:
    """Replace ``auto`` by what this machine, or the cluster, has.

    Raises:
        ConfigError: More is asked for than there is.
    """
    assert isinstance(config, EasyR1Config)
    return on_this_machine(config)


def on_this_machine(config: EasyR1Config) -> EasyR1Config:
    """The same with ``auto`` replaced by this machine's device, arithmetic and GPUs.

    Raises:
        ConfigError: There is no GPU, there are fewer than are asked for, or one is asked for what it cannot do.
    """
    if config.ray_address is not None:
        return _elsewhere(config, "the GPUs are those of the Ray cluster, not of this machine")
    resolved = resolve_device(config)
    processes = resolve_processes(config, resolved.device)
    return _checked(config, device=resolved.device, dtype=resolved.dtype, processes=processes)


def planned(config: EasyR1Config) -> EasyR1Config:
    """The same with ``auto`` replaced, for a plan: a machine without GPUs may plan for one that has them.

    Raises:
        ConfigError: How many GPUs there will be is left to GPUs that are not here.
    """
    if config.device != "cuda" or torch.cuda.is_available():
        return on_this_machine(config)
    return _elsewhere(config, "this machine has no GPU to count")


def _elsewhere(config: EasyR1Config, why: str) -> EasyR1Config:
    """For GPUs that are not here."""
    if config.processes == "auto":
        raise ConfigError(
            f"processes of the engine easyr1 is auto, but {why}.",
            "say rft_engine.processes=N, the GPUs of each node (engine.processes=N if it trains all methods)",
        )
    return _checked(config, device="cuda", dtype="bfloat16" if config.dtype == "auto" else config.dtype)


def _checked(config: EasyR1Config, **values: object) -> EasyR1Config:
    """The configuration with these values, under the rules that it was excused from while they were ``auto``."""
    try:
        return EasyR1Config.model_validate({**config.model_dump(), **values})
    except ValidationError as error:
        broken = error.errors()[0]["ctx"]["error"]
        raise ConfigError(f"{broken.at[-1]} of the engine easyr1: {broken}.", "change the value") from None

"""Stage -> native files -> the framework's own command -> checked checkpoint."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpt_rft.config.engine import EngineConfig, LlamaFactoryConfig
from cpt_rft.config.methods import SftMethod
from cpt_rft.engines.base import Stage, StepLog
from cpt_rft.engines.environment import environment_variables, find_environment
from cpt_rft.engines.handover import assemble, sing, start_checkpoint
from cpt_rft.engines.llamafactory.failures import explain
from cpt_rft.engines.llamafactory.merge import merge_lora
from cpt_rft.engines.llamafactory.native import DATA, OUT, command, settings, world, write_native
from cpt_rft.engines.llamafactory.resume import kept_lines, make_loadable, open_out
from cpt_rft.engines.llamafactory.rows import WrittenRows, canary_prompts, write_rows
from cpt_rft.engines.llamafactory.watch import Follower, check_start, check_zero, merge_history
from cpt_rft.engines.local.runtime import resolve as resolve_device
from cpt_rft.engines.local.runtime import resolve_processes
from cpt_rft.engines.outside import end_leftovers, running, said_since, size_of, status_within
from cpt_rft.errors import ConfigError, TrainingError
from cpt_rft.files import sha256_file
from cpt_rft.vision import VisionSpec

NAME = "llamafactory"
_POLL_S = 0.2


class LlamaFactoryEngine:
    """Trains by LLaMA-Factory's own command."""

    def train(self, stage: Stage, report: Callable[[StepLog], None]) -> None:
        """See `cpt_rft.engines.base.Engine.train`."""
        engine, method = supported(stage)
        environment = find_environment(NAME, engine.environment)
        directory = stage.directory / NAME
        directory.mkdir(exist_ok=True)
        end_leftovers(directory)
        spec = VisionSpec.read(stage.parent).with_limits(engine.min_pixels, engine.max_pixels)
        start = start_checkpoint(stage.parent, spec, directory / "start")
        written = write_rows(stage, start, spec, engine.cutoff_len, directory / DATA)
        log = stage.directory / "train" / "log.jsonl"
        log.parent.mkdir(exist_ok=True)

        keys = settings(engine, method, start, spec, stage.seed, None)
        told = {**keys, "rows": sha256_file(directory / DATA / "rows.json"), "save_steps": None}
        step = open_out(directory / OUT, told, world(engine), lora=engine.lora is not None)
        lines = kept_lines(log, step, directory / OUT, written)
        log.write_text("".join(line.line() + "\n" for line in lines), encoding="utf-8")
        resume = f"{OUT}/checkpoint-{step}" if step else None
        if resume and engine.deepspeed == "none" and engine.lora is None:
            make_loadable(directory / resume)
        write_native(directory, {**keys, "resume_from_checkpoint": resume} if resume else keys, engine, environment)
        run = _Run(stage, engine, method, environment, written)
        run.follow(step, lines, report, log)

        weights = directory / OUT
        if engine.lora is not None:
            weights = merge_lora(environment, directory, start, run.log)
        merge_history(log, directory / OUT, lines)
        assemble(weights, start, stage.directory / "checkpoint")
        checkpoint = stage.directory / "checkpoint"
        sing("LLaMA-Factory", environment, checkpoint, canary_prompts(directory / DATA), directory)
        for name in (
            OUT,
            "start",
            "merged",
        ):  # the weights are in the checkpoint; data and YAML stay, to be run by hand
            shutil.rmtree(directory / name, ignore_errors=True)


class _Run:
    """One start of the framework's command."""

    def __init__(
        self, stage: Stage, engine: LlamaFactoryConfig, method: SftMethod, environment: Path, written: WrittenRows
    ) -> None:
        self.engine, self.method, self.environment, self.written = engine, method, environment, written
        self.directory = stage.directory / NAME
        self.log = self.directory / "framework.log"

    def follow(self, step: int, lines: list[StepLog], report: Callable[[StepLog], None], ours: Path) -> None:
        """Run it to its end; every step is reported and logged as it is seen.

        Raises:
            UserError: It failed, or does something else than it was told.
        """
        said = size_of(self.log)
        follower = Follower(self.directory / OUT, self.written, step)
        started = False
        with (
            running(
                command(self.engine, self.directory), self.directory, environment_variables(self.environment), self.log
            ) as process,
            ours.open("a", encoding="utf-8") as file,
        ):
            while True:
                ended = status_within(process, _POLL_S)
                if not started:
                    started = check_start(said_since(self.log, said), self.written, self.method.prompts_per_step)
                    follower.last = time.monotonic()
                for line in follower.new_steps():
                    if not lines or line.step == step + 1:
                        check_zero(said_since(self.log, said), self.engine.deepspeed)
                    lines.append(line)
                    file.write(line.line() + "\n")
                    file.flush()
                    report(line)
                if ended is not None:
                    break
        if ended:
            raise explain(ended, said_since(self.log, said), self.log)
        if len(lines) != len(self.written.targets) or not (started or step == len(lines)):
            raise TrainingError(
                f"LLaMA-Factory ended after {len(lines)} of {len(self.written.targets)} steps without an error.",
                f"see {self.log}",
            )


def supported(stage: Stage) -> tuple[LlamaFactoryConfig, SftMethod]:
    """The stage's engine and method.

    Raises:
        ConfigError: The engine cannot train this method.
    """
    assert isinstance(stage.engine, LlamaFactoryConfig)
    return stage.engine, supported_method(stage.method)


def supported_method(method: Any) -> SftMethod:
    """The method itself, if it is supervised and nothing holds it back that the framework has not.

    Raises:
        ConfigError: It is not.
    """
    if method.kind != "sft":
        raise ConfigError(
            f"The engine llamafactory trains supervised methods, {method.name} is of the kind {method.kind}.",
            "use the engine local for it, or an experiment of its own",
        )
    assert isinstance(method, SftMethod)
    absent = [*method.restraints, *(key for key in ("filter", "rollouts") if getattr(method, key) is not None)]
    if absent:
        raise ConfigError(
            f"The engine llamafactory has no {' and no '.join(absent)}, which {method.name} asks for.",
            "use the engine local for it, or take the part out of the method",
        )
    return method


def resolve(config: EngineConfig) -> EngineConfig:
    """Replace ``auto`` by this machine's GPUs, one process each.

    Raises:
        ConfigError: More is asked for than there is.
    """
    assert isinstance(config, LlamaFactoryConfig)
    return on_this_machine(config)


def on_this_machine(config: LlamaFactoryConfig) -> LlamaFactoryConfig:
    """The same with ``auto`` replaced.

    Raises:
        ConfigError: There is no GPU, there are fewer than processes are asked for, or what is asked for is not sound
            without one.
    """
    resolved = resolve_device(config)
    assert isinstance(resolved, LlamaFactoryConfig)
    if not resolved.device.startswith("cuda") and resolved.deepspeed.startswith("zero3"):
        # Source: https://github.com/deepspeedai/DeepSpeed/pull/8539, after the last release that the framework takes.
        raise ConfigError(
            f"engine.deepspeed is {resolved.deepspeed}, but on CPU this DeepSpeed uses gathered weights before all have"
            " arrived: what it saves may be garbage.",
            "say engine.deepspeed=zero2 or none, or train on GPUs",
        )
    return resolved.model_copy(update={"processes": resolve_processes(resolved, resolved.device)})


def planned(config: LlamaFactoryConfig) -> LlamaFactoryConfig:
    """The same with ``auto`` replaced, for a plan: a machine without GPUs may plan for one that has them.

    Raises:
        ConfigError: How many processes there will be is left to GPUs that are not here.
    """
    if not config.device.startswith("cuda") or torch.cuda.is_available():
        return on_this_machine(config)
    if config.processes == "auto":
        raise ConfigError(
            "engine.processes is auto, one process a GPU, but this machine has no GPU to count.",
            "say engine.processes=N to plan for a machine with N GPUs",
        )
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    return config.model_copy(update={"dtype": dtype})

"""What an engine is: something that turns a stage into a checkpoint. Light to import; engines load on demand."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from cpt_rft.config.engine import EngineConfig
from cpt_rft.config.methods import MethodConfig

_DIGITS = 6
ARTEFACTS_NAME = "artefacts"


@dataclass(frozen=True)
class EarlierStage:
    """A stage before this one in its chain.

    Attributes:
        tasks: What it trained on.
        data: Its training rows, one parquet file a task.
        artefacts: What it left for later stages beside its checkpoint; absent where it left nothing.
    """

    tasks: tuple[str, ...]
    data: tuple[Path, ...]
    artefacts: Path


@dataclass(frozen=True)
class Source:
    """A checkpoint whose rollouts a stage learns from.

    Attributes:
        checkpoint: Its directory.
        label: Which it is, for the rows made from them.
    """

    checkpoint: Path
    label: str


@dataclass(frozen=True)
class Stage:
    """One training job.

    Attributes:
        directory: Work directory of the stage. The engine writes ``checkpoint/`` and ``train/log.jsonl`` into it,
            ``artefacts/`` if later stages need more than the checkpoint, and ``resume/`` while it trains.
        parent: Checkpoint to start from.
        base: Base checkpoint of the sequence, the reference policy.
        tasks: One task, or all of them for joint training.
        data: One parquet file of training rows a task.
        method: What to optimise.
        engine: How to compute; ``auto`` values already resolved (`resolve_engine`).
        prompt_preset: Which prompt suffixes.
        seed: Training seed.
        seed_path: Prefix of every seed that belongs to this stage.
        history: The stages before this one, in order.
        source: Who tries the rows first, for a method that chooses or writes its rows by that; the parent if none.
    """

    directory: Path
    parent: Path
    base: Path
    tasks: tuple[str, ...]
    data: tuple[Path, ...]
    method: MethodConfig
    engine: EngineConfig
    prompt_preset: str
    seed: int
    seed_path: tuple[str | int, ...]
    history: tuple[EarlierStage, ...] = ()
    source: Source | None = None


@dataclass(frozen=True)
class StepLog:
    """One optimiser step, as reported and as one line of ``train/log.jsonl``. What a method has not is none.

    Attributes:
        step: Counts from 1.
        steps: Steps of the stage (not in the log line).
        loss: What was differentiated, summed over micro-batches.
        reward: Mean reward of the completions.
        accuracy: Mean strict score of the completions.
        format: Share of completions in the form their style asks for.
        kl: Mean k3 divergence from the reference a token.
        length: Mean target or completion length in tokens.
        truncated: Share of completions that the length limit ended.
        grad_norm: Norm of the gradient before clipping; none if it was not finite.
        lr: Learning rate of this step.
        zero_variance: Share of groups whose rewards are all equal.
        skipped: Steps of this stage skipped so far because loss or gradient was not finite.
        seconds: Wall time of the step.
        tokens: Target or completion tokens in the loss.
        entropy: Mean entropy of the policy a completion token, in nats.
        rollout_gap: Largest difference between a token's log-probability in the rollout and in the update.
        rollout_gap_mean: Mean of that difference.
        unscored: Completions whose scoring failed for a reason that is no one's answer; they earned nothing.
        rounded_groups: Groups of equal rewards with an advantage that is not zero by rounding (`paper_rounding`).
        shown: Mean tokens of the target that were shown a prompt (UFT, Prefix-RFT).
        difficulty: Target difficulty of the step (AdaRFT).
        replayed: Rows of earlier tasks in the step.
        penalty: What holds the model back, summed, as it was differentiated beside the loss.
        reward_variance: Mean over prompts of the unbiased variance of the rewards of a prompt's completions.
        all_right: Share of groups whose completions are all right by the strict score.
        all_wrong: Share of groups whose completions are all wrong by it.
        grad_norm_right: Norm of the share of the all-right groups in the gradient, where there are any; in the first
            step of a stage and every twentieth after it.
        grad_norm_mixed: The same of the groups with right and wrong completions.
        grad_norm_wrong: The same of the all-wrong groups.
        memory_bytes: The most that the process held since the stage began: of the GPU's memory, else of the machine's.
        energy_joules: Energy of the step by the counter of the GPU or of the processor; none where it cannot be read.
    """

    step: int
    steps: int
    loss: float | None
    lr: float
    grad_norm: float | None
    skipped: int
    seconds: float
    tokens: int
    length: float
    reward: float | None = None
    accuracy: float | None = None
    format: float | None = None
    kl: float | None = None
    truncated: float | None = None
    zero_variance: float | None = None
    entropy: float | None = None
    rollout_gap: float | None = None
    rollout_gap_mean: float | None = None
    unscored: int | None = None
    rounded_groups: int | None = None
    shown: float | None = None
    difficulty: float | None = None
    replayed: int | None = None
    penalty: float | None = None
    reward_variance: float | None = None
    all_right: float | None = None
    all_wrong: float | None = None
    grad_norm_right: float | None = None
    grad_norm_mixed: float | None = None
    grad_norm_wrong: float | None = None
    memory_bytes: int | None = None
    energy_joules: float | None = None

    def line(self) -> str:
        """The line of the log, without its newline."""
        fields = {key: value for key, value in asdict(self).items() if key != "steps"}
        rounded = {
            key: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for key, value in fields.items()
        }
        return json.dumps(rounded)


class Engine(Protocol):
    """Trains one stage. Killed and called again, it goes on where it was and ends with the same bits."""

    def train(self, stage: Stage, report: Callable[[StepLog], None]) -> None:
        """Write the stage's checkpoint and log.

        Raises:
            TrainingError: Too many steps had a loss or gradient that is not finite.
            CheckpointError: The parent or the base cannot be loaded.
            DataError: A row cannot be used by the method.
        """
        ...


def get_engine(config: EngineConfig) -> Engine:
    """The engine that a configuration names."""
    if config.name == "llamafactory":
        from cpt_rft.engines.llamafactory.engine import LlamaFactoryEngine

        return LlamaFactoryEngine()
    if config.name == "easyr1":
        from cpt_rft.engines.easyr1.engine import EasyR1Engine

        return EasyR1Engine()
    from cpt_rft.engines.local.train import LocalEngine

    return LocalEngine()


def resolve_engine(config: EngineConfig) -> EngineConfig:
    """The same configuration with ``auto`` replaced by what this machine has; done once a run, then kept."""
    if config.name == "llamafactory":
        from cpt_rft.engines.llamafactory.engine import resolve as resolve_llamafactory

        return resolve_llamafactory(config)
    if config.name == "easyr1":
        from cpt_rft.engines.easyr1.machine import resolve as resolve_easyr1

        return resolve_easyr1(config)
    from cpt_rft.engines.local.runtime import resolve

    return resolve(config)


def check_environment(config: EngineConfig) -> None:
    """Find the environment that the engine trains in; one that trains in this process has none.

    Raises:
        ConfigError: It is not there.
    """
    from cpt_rft.engines.environment import find_environment

    if config.name == "llamafactory":
        find_environment(config.name, config.environment)
    elif config.name == "easyr1":
        from cpt_rft.engines.easyr1.machine import environment_of

        environment_of(config)

"""The local engine: the loop around an objective."""

import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from cpt_rft.checkpoint import Policy, load_policy, save_checkpoint
from cpt_rft.config.engine import LocalConfig
from cpt_rft.engines.base import Stage, StepLog
from cpt_rft.engines.local.batches import stage_batches
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.objective import Objective
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.engines.local.resume import Journal, Progress, stage_fingerprint
from cpt_rft.engines.local.runtime import prepare
from cpt_rft.engines.local.sft import SftObjective


class LocalEngine:
    """Trains in this process."""

    def train(self, stage: Stage, report: Callable[[StepLog], None]) -> None:
        """See `cpt_rft.engines.base.Engine.train`."""
        engine = stage.engine
        assert isinstance(engine, LocalConfig)
        dtype, device = prepare(engine)
        batches = stage_batches(stage)
        policy = load_policy(stage.parent, device=device)
        optimiser = Optimiser(
            policy.model, stage.method, len(batches), dtype=dtype, max_skipped=engine.max_skipped_steps
        )
        objective = make_objective(stage, policy, dtype, device)
        journal = Journal(stage, stage_fingerprint(stage, dtype))
        progress = journal.open()
        if progress is not None:
            optimiser.restore(progress.optimiser)
        for step in range(progress.step if progress else 0, len(batches)):
            started = time.perf_counter()
            result = objective.gradients(step, batches[step], optimiser.backward)
            outcome = optimiser.step(step, result.loss)
            fields: dict[str, Any] = {key: _finite(value) for key, value in result.fields.items()}
            line = StepLog(
                step=step + 1,
                steps=len(batches),
                loss=result.loss if math.isfinite(result.loss) else None,
                lr=outcome.lr,
                grad_norm=outcome.grad_norm,
                skipped=optimiser.skipped,
                seconds=time.perf_counter() - started,
                **fields,
            )
            journal.write(line)
            report(line)
            if (step + 1) % engine.save_every == 0 and step + 1 < len(batches):
                journal.save(Progress(step + 1, optimiser.state()))
        checkpoint = stage.directory / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)  # left by a process that was killed at this very point
        save_checkpoint(optimiser.named_weights(), checkpoint, source=stage.parent)
        journal.close()


def make_objective(stage: Stage, policy: Policy, dtype: torch.dtype, device: str) -> Objective:
    """The objective of a stage; the reference policy is loaded only where it is needed."""
    method = stage.method
    if method.kind == "sft":
        return SftObjective(policy, method, stage.prompt_preset)
    reference = None
    if method.kl_coef > 0:
        directory = stage.base if method.kl_reference == "base" else stage.parent
        reference = load_policy(directory, dtype=dtype, device=device)
        reference.model.requires_grad_(False)
    return GrpoObjective(policy, reference, method, stage.prompt_preset, stage.seed_path)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no not-a-number."""
    return value if value is None or math.isfinite(value) else None

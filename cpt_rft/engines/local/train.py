"""The local engine: the loop around an objective."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpt_rft.algos.wise_ft import averaged_weights
from cpt_rft.checkpoint import Policy, load_policy, save_checkpoint
from cpt_rft.config.engine import LocalConfig
from cpt_rft.data.example import Example
from cpt_rft.engines.base import ARTEFACTS_NAME, Stage, StepLog
from cpt_rft.engines.local.admit import check_rows
from cpt_rft.engines.local.batches import stage_batches, stage_rows
from cpt_rft.engines.local.curriculum import CurriculumObjective
from cpt_rft.engines.local.hybrids import reinforced
from cpt_rft.engines.local.importance import leave_importance
from cpt_rft.engines.local.lora import ADAPTER_NAME, Adapter
from cpt_rft.engines.local.objective import Objective
from cpt_rft.engines.local.optimise import BaseOptimiser, Optimiser
from cpt_rft.engines.local.parallel import train_together
from cpt_rft.engines.local.restrain import make_restraints
from cpt_rft.engines.local.resume import Journal, Progress, stage_fingerprint
from cpt_rft.engines.local.rollouts import LocalAttempt, chosen_rows, clear_rollouts, leave_rollouts
from cpt_rft.engines.local.rounds import rounds_of, train_rounds
from cpt_rft.engines.local.runtime import prepare
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.engines.local.team import ALONE, Team
from cpt_rft.engines.local.usage import Usage
from cpt_rft.engines.local.zero import ShardedOptimiser, Sharing, refuse_whole_weights
from cpt_rft.files import read_json_lines
from cpt_rft.seeds import derive_seed


class LocalEngine:
    """Trains in this process, or in several that it starts."""

    def train(self, stage: Stage, report: Callable[[StepLog], None]) -> None:
        """See `cpt_rft.engines.base.Engine.train`."""
        refuse_whole_weights(local_config(stage), stage.method)
        if rounds_of(stage.method) > 1:
            train_rounds(stage, report, _train)
        else:
            _train(stage, report)


def _train(stage: Stage, report: Callable[[StepLog], None]) -> None:
    """In this process or in several."""
    processes = local_config(stage).processes
    if processes > 1:
        train_together(stage, processes, report)
    else:
        train_stage(stage, ALONE, report)


def train_stage(stage: Stage, team: Team, report: Callable[[StepLog], None]) -> None:
    """This process's share of a stage; the one that leads writes everything."""
    engine = local_config(stage)
    dtype, device = prepare(engine, team.rank if team.size > 1 else None)
    fingerprint = stage_fingerprint(stage, dtype)
    attempt = LocalAttempt(stage, dtype, device)
    batches = stage_batches(stage, chosen_rows(stage, stage_rows(stage), fingerprint, attempt, team))
    policy = load_policy(stage.parent, device=device)
    policy.model.model.language_model.gradient_checkpointing = engine.gradient_checkpointing
    check_rows(policy, stage.method, batches, stage.prompt_preset)
    adapter = make_adapter(stage, policy)
    optimiser = make_optimiser(stage, policy, len(batches), dtype, team)
    objective = make_objective(stage, policy, batches, dtype, device, team)
    restraints = make_restraints(stage, policy, optimiser, adapter, dtype, device)
    journal = Journal(stage, fingerprint)
    begin = _resume(journal, optimiser, objective, team)
    usage = Usage(device)
    for step in range(begin, len(batches)):
        started = time.perf_counter()
        rows = batches[step]
        new = [row for row in rows if row.task in stage.tasks]
        result = objective.gradients(step, rows, optimiser.backward)
        penalty = sum(restraint.gradients(new, optimiser.backward) for restraint in restraints)
        outcome = optimiser.step(step, result.loss + penalty)
        fields: dict[str, Any] = {key: _finite(value) for key, value in result.fields.items()}
        line = StepLog(
            step=step + 1,
            steps=len(batches),
            loss=result.loss if math.isfinite(result.loss) else None,
            lr=outcome.lr,
            grad_norm=outcome.grad_norm,
            skipped=optimiser.skipped,
            seconds=time.perf_counter() - started,
            memory_bytes=usage.memory_bytes(),
            energy_joules=usage.energy_joules(),
            replayed=len(rows) - len(new) if stage.method.replay else None,
            penalty=_finite(penalty) if restraints else None,
            **fields,
        )
        due = (step + 1) % engine.save_every == 0 and step + 1 < len(batches) and objective.settled(step)
        state = optimiser.state() if due else None
        if not team.leads:
            continue
        journal.write(line)
        report(line)
        if state is not None:
            journal.save(Progress(step + 1, state))
    trained = optimiser.named_weights()
    if team.leads:
        _publish(stage, policy, optimiser, trained, adapter)
        journal.close()
        clear_rollouts(stage)


def local_config(stage: Stage) -> LocalConfig:
    """The configuration of this engine, which `get_engine` chose by it."""
    assert isinstance(stage.engine, LocalConfig)
    return stage.engine


def make_optimiser(stage: Stage, policy: Policy, steps: int, dtype: torch.dtype, team: Team) -> BaseOptimiser:
    """The optimiser of a stage; its weights become the model's."""
    limit = local_config(stage).max_skipped_steps
    if isinstance(team, Sharing):
        return ShardedOptimiser(policy.model, stage.method, steps, dtype=dtype, max_skipped=limit, team=team)
    return Optimiser(policy.model, stage.method, steps, dtype=dtype, max_skipped=limit, team=team)


def _resume(journal: Journal, optimiser: BaseOptimiser, objective: Objective, team: Team) -> int:
    """Take up the resume point, if there is one that can be used; returns the steps that are done."""
    progress = journal.open() if team.leads else None
    done = team.told(progress.step if progress else 0)
    if done and not team.leads:
        progress = journal.load()
    if progress is not None:
        optimiser.restore(progress.optimiser)
    if done and isinstance(objective, CurriculumObjective):
        objective.recall([line["reward"] for line in read_json_lines(journal.log)[:done]])
    return done


def _publish(
    stage: Stage, policy: Policy, optimiser: BaseOptimiser, trained: Mapping[str, Tensor], adapter: Adapter | None
) -> None:
    """Write the checkpoint and what later stages need beside it, anew if a process was killed at this very point."""
    checkpoint, artefacts = stage.directory / "checkpoint", stage.directory / ARTEFACTS_NAME
    for left in (checkpoint, artefacts):
        shutil.rmtree(left, ignore_errors=True)
    weights = published_weights(stage, trained, adapter)
    save_checkpoint(weights, checkpoint, source=stage.parent)
    if adapter is not None:
        adapter.save(artefacts / ADAPTER_NAME, trained)
    if stage.method.ewc is not None:
        assert isinstance(optimiser, Optimiser)  # `refuse_whole_weights`
        optimiser.assign(weights)
        leave_importance(stage, policy, optimiser, stage.method.ewc)
    leave_rollouts(stage, artefacts)


def make_adapter(stage: Stage, policy: Policy) -> Adapter | None:
    """The adapters of a stage that trains nothing else, or none."""
    settings = stage.method.lora
    return None if settings is None else Adapter(policy.model, settings, derive_seed(*stage.seed_path, "lora"))


def make_objective(
    stage: Stage,
    policy: Policy,
    batches: Sequence[Sequence[Example]],
    dtype: torch.dtype,
    device: str,
    team: Team = ALONE,
) -> Objective:
    """The objective of a stage; the reference policy is loaded only where it is needed."""
    method = stage.method
    if method.kind == "sft":
        return SftObjective(policy, method, stage.prompt_preset, team)
    reference = None
    if method.kl_coef > 0:
        directory = stage.base if method.kl_reference == "base" else stage.parent
        reference = load_policy(directory, dtype=dtype, device=device)
        reference.model.requires_grad_(False)
    return reinforced(stage, method, policy, reference, batches, team)


def published_weights(stage: Stage, trained: Mapping[str, Tensor], adapter: Adapter | None) -> dict[str, Tensor]:
    """The float32 weights that the stage hands on, by name.

    Args:
        stage: The stage.
        trained: The float32 weights that it has trained, by name.
        adapter: The adapters that they are, or none.
    """
    average = stage.method.average
    if average is None and adapter is None:
        return dict(trained)
    start = dict(load_policy(stage.parent).model.named_parameters())
    weights = {name: weight.cpu() for name, weight in trained.items()}
    if adapter is not None:
        weights = adapter.merged(start, weights)
    return weights if average is None else averaged_weights(start, weights, average.share)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no not-a-number."""
    return value if value is None or math.isfinite(value) else None

"""What the study needs mended in EasyR1 at the pinned commit, from outside the submodule.

Each fix says what is broken, where, and when it can go. They are applied in the process of the trainer, but for the
reference, which is one of the workers. The framework is imported only where it is mended: it is in no environment of
ours, and what is computed here is tested without it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from cpt_rft.algos.grpo import zero_variance
from cpt_rft.config.strict import Strict
from cpt_rft.engines.easyr1.groups import group_numbers, places_of
from cpt_rft.errors import ConfigError

Estimate = Callable[..., tuple[Tensor, Tensor]]
COMPARED = ("grpo", "rloo")  # estimators for which equal rewards mean no gradient
METRICS = "cpt_rft"


class Fixes(Strict):
    """What is mended in a stage, and where it runs: the content of ``fixes.json``."""

    reference: str | None
    """Directory of the model that the KL penalty pulls to; null for the framework's own choice, the stage's start."""
    exact_zero: bool
    """Whether a group of equal rewards has an advantage of exactly zero."""
    count_rounded: str | None
    """File that gets a line a step on groups of equal rewards whose advantage is not zero; null for none."""
    device: Literal["cuda", "cpu"]
    """Whether the framework's workers train, on GPUs, or ours."""
    ray_address: str | None
    """The Ray cluster to join; null for the one that ``RAY_ADDRESS`` names, or else a new one."""

    @classmethod
    def read(cls, path: Path) -> "Fixes":
        """The content of a file.

        Raises:
            ConfigError: A key is missing, unknown or of another type.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ConfigError(f"{path}: {where}: {first['msg']}.", "write the stage's files again") from error


def apply_fixes(fixes: Fixes, config: Any) -> None:
    """Mend the trainer's modules in this process.

    Args:
        fixes: What to mend.
        config: The framework's configuration.

    Raises:
        ConfigError: The reference cannot be another model than the framework's.
    """
    from verl.trainer import core_algos, ray_trainer

    if fixes.reference is not None and not config.algorithm.disable_kl and config.worker.actor.model.lora.rank > 0:
        raise ConfigError(
            "With an adapter EasyR1's reference is the model below it, which is the start of the stage.",
            "set the reference to the stage's start, or train without worker.actor.model.lora",
        )
    estimator = str(getattr(config.algorithm.adv_estimator, "value", config.algorithm.adv_estimator))
    estimates = core_algos.ADV_ESTIMATOR_MAP
    if estimator == "remax":
        estimates["remax"] = remax_estimate
        ray_trainer.RayPPOTrainer._make_batch_data = without_greedy_settings(ray_trainer.RayPPOTrainer._make_batch_data)
    if estimator in COMPARED and fixes.exact_zero:
        estimates[estimator] = exactly_zero(estimates[estimator])
    ray_trainer.compute_data_metrics = with_group_numbers(
        ray_trainer.compute_data_metrics, compared=estimator in COMPARED
    )
    if fixes.count_rounded is not None:
        ray_trainer.Tracker = counting(ray_trainer.Tracker, Path(fixes.count_rounded))


# --- ReMax ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def remax_estimate(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (S, T) of ReMax: the reward of a response less that of its prompt's greedy response.

    Mends verl/trainer/core_algos.py compute_remax_outcome_advantage, which multiplies (S,) by (S, T): it raises, or
    where S = T is silently wrong. Drop it once that function has the missing axis; broken since cf41904 (October 2025).

    Source: ReMax, arXiv 2310.10505.
    """
    gains_S = token_level_rewards.sum(dim=-1) - reward_baselines
    returns_ST = (token_level_rewards * response_mask).flip(-1).cumsum(-1).flip(-1)
    return gains_S[:, None] * response_mask, returns_ST


def without_greedy_settings(make_batch: Callable[..., Any]) -> Callable[..., Any]:
    """Mends verl/trainer/ray_trainer.py RayPPOTrainer._make_batch_data.

    Under ReMax the settings of the greedy call (temperature 0, n 1) stay in the batch, and the union with the
    log-probabilities, which bring their own temperature, fails. Drop it once the source takes them out itself.
    """

    @wraps(make_batch)
    def mended(self: Any, metrics: dict[str, Any]) -> Any:
        batch = make_batch(self, metrics)
        for key in ("temperature", "n"):
            batch.meta_info.pop(key, None)
        return batch

    return mended


# --- groups of equal rewards ------------------------------------------------------------------------------------------


def exactly_zero(estimate: Estimate) -> Estimate:
    """An estimate whose advantage is exactly zero in a group of equal rewards.

    Mends verl/trainer/core_algos.py compute_grpo_outcome_advantage (and, with far smaller numbers,
    compute_rloo_outcome_advantage): the rounding error of a float32 mean, divided by a standard deviation of zero plus
    1e-6, is up to 0.06, the same for every response of a group that is solved or hopeless. Drop it once the source
    treats such groups apart.
    """

    @torch.no_grad()
    def mended(**inputs: Any) -> tuple[Tensor, Tensor]:
        compared_S = inputs["token_level_rewards"].sum(dim=-1)
        advantages_ST, _ = estimate(**inputs)
        for places in places_of(inputs["index"]):
            if bool(zero_variance(compared_S[places][None])):
                advantages_ST[places] = 0.0
        return advantages_ST, advantages_ST  # as the source: their returns are their advantages

    return mended


def with_group_numbers(data_metrics: Callable[..., dict[str, Any]], *, compared: bool) -> Callable[..., dict[str, Any]]:
    """The trainer's numbers of a step and ours on its groups; no number changes what is trained.

    Args:
        data_metrics: verl/trainer/metrics.py compute_data_metrics.
        compared: Whether the estimate compares the responses of a group, so that equal ones should have no advantage.
    """

    @wraps(data_metrics)
    def counted(batch: Any, use_critic: bool = False) -> dict[str, Any]:
        metrics = data_metrics(batch=batch, use_critic=use_critic)
        uids = list(batch.non_tensor_batch["uid"])
        if len(set(uids)) == len(uids):
            return metrics  # one response a prompt
        tensors = batch.batch
        scores_S, compared_S = (tensors[f"token_level_{name}"].sum(dim=-1) for name in ("scores", "rewards"))
        numbers = group_numbers(scores_S, compared_S, tensors["advantages"] * tensors["response_mask"], uids)
        kept = numbers if compared else {name: numbers[name] for name in ("groups", "zero_variance", "reward_variance")}
        return metrics | {f"{METRICS}/{name}": number for name, number in kept.items()}

    return counted


def counting(tracker: type, path: Path) -> type:
    """A tracker that also appends our numbers to a file, which no resume empties, as it does the framework's log.

    A step that is done again after a resume has a second line, and that one counts.
    """

    class Counting(tracker):
        def log(self, data: dict[str, Any], step: int) -> None:
            super().log(data=data, step=step)
            ours = {key.split("/")[1]: value for key, value in data.items() if key.startswith(f"{METRICS}/")}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **ours}) + "\n")

    return Counting


# --- the reference model ----------------------------------------------------------------------------------------------


def worker_class(fixes: Fixes) -> type:
    """The class of the workers."""
    worker: type
    if fixes.device == "cpu":
        from cpt_rft.engines.easyr1 import cpu_worker

        worker = cpu_worker.LocalWorker
    else:
        from verl.workers import fsdp_workers

        worker = fsdp_workers.FSDPWorker
    return worker if fixes.reference is None else anchored(worker, fixes.reference)


def anchored(worker: type, reference: str) -> type:
    """A worker whose reference model is another directory than the actor's.

    Mends verl/workers/fsdp_workers.py FSDPWorker.init_model, which builds the reference from
    ``worker.actor.model.model_path``: in a chain of tasks the penalty then pulls to the start of the stage, not to the
    base. Tokenizer and configuration stay the actor's, as in the source. Drop it once the source has a path for it.

    The framework makes its outer class of the first base of the worker's class (single_controller/ray/base.py
    create_colocated_worker_cls), and makes that one without arguments. Hence the class in between: its first base is
    the worker's own first base.
    """

    class Anchor(worker.__base__):  # type: ignore[name-defined]
        def _build_model_optimizer(self, *, model_config: Any, role: str, **others: Any) -> None:
            if role == "ref":
                model_config = replace(model_config, model_path=reference)
            super()._build_model_optimizer(model_config=model_config, role=role, **others)

    return type(f"Anchored{worker.__name__}", (Anchor, worker), {})

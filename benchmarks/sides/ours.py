"""Our side: the local engine as a stage runs it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from serve import Gate, settings, synchronise, versions

from cpt_rft.checkpoint import Policy, encode_prompts, load_policy
from cpt_rft.config.methods import GrpoMethod, SftMethod
from cpt_rft.data.example import Example
from cpt_rft.engines.local.generate import Completion, generate
from cpt_rft.engines.local.grpo import GrpoObjective
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.engines.local.runtime import keep_freed_memory
from cpt_rft.engines.local.sft import SftObjective
from cpt_rft.prompts import user_text
from cpt_rft.scoring import Score

Unit = Callable[[], None]
STYLE, PRESET = "direct", "miniature"


def examples(folder: Path, case: dict[str, Any]) -> list[Example]:
    """The rows of a case."""
    return [
        Example(
            id=f"benchmark/train/{number}",
            task="benchmark",
            split="train",
            images=((folder / row["picture"]).read_bytes(),),
            image_paths=(row["picture"],),
            problem=row["problem"],
            answer=row["answer"],
            references=(row["answer"],),
            kind="short_text",
        )
        for number, row in enumerate(case["rows"])
    ]


class FixedRewards(GrpoObjective):
    """Scores completions as always, then has every second one right, except in the first ``zero_groups``."""

    group, zero_groups, seen = 1, 0, 0

    def gradients(self, *arguments: Any) -> Any:
        """One step; its completions count from 0."""
        self.seen = 0
        return super().gradients(*arguments)

    def score(self, row: Example, completion: Completion) -> Score:
        """The score of a completion by its place in the step."""
        right = self.seen % 2 and self.seen // self.group >= self.zero_groups
        self.seen += 1
        return super().score(row, completion)._replace(strict=float(right))


def trained(case: dict[str, Any], policy: Policy, method: Any, objective: Any) -> Callable[[Sequence[Example]], Unit]:
    """Steps of an objective and the optimiser, as the engine's loop takes them."""
    dtype = getattr(torch, case["dtype"])
    optimiser = Optimiser(policy.model, method, 10**6, dtype=dtype, max_skipped=0)

    def with_rows(rows: Sequence[Example]) -> Unit:
        count = 0

        def unit() -> None:
            nonlocal count
            result = objective.gradients(count, rows, optimiser.backward)
            optimiser.step(count, result.loss)
            count += 1

        return unit

    return with_rows


def grpo(case: dict[str, Any], policy: Policy, rows: list[Example]) -> Unit:
    """A whole step: rollouts, scores, update."""
    method = GrpoMethod(
        **{"name": "grpo", "kind": "grpo", "style": STYLE, "lr": 1e-6, "kl_coef": 0.0, "group": case["group"]},
        **{"prompts_per_step": case["prompts"], "micro_batch": case["prompts"], "max_new_tokens": case["new_tokens"]},
    )
    make = trained(case, policy, method, objective := FixedRewards(policy, None, method, PRESET, ("benchmark",)))
    objective.group, objective.zero_groups = case["group"], case.get("zero_groups", 0)
    return make(rows)


def sft(case: dict[str, Any], policy: Policy, rows: list[Example]) -> Unit:
    """A step on answers."""
    policy.model.model.visual.requires_grad_(not case["frozen"])
    method = SftMethod(
        **{"name": "sft", "kind": "sft", "style": STYLE, "lr": 1e-6},
        **{"prompts_per_step": case["prompts"], "micro_batch": case["prompts"]},
    )
    return trained(case, policy, method, SftObjective(policy, method, PRESET))(rows)


def written(case: dict[str, Any], policy: Policy, rows: list[Example]) -> Unit:
    """Completions alone: sampled groups, or one greedy answer a row; pictures and text are prepared within."""
    greedy = case["work"] == "evaluate"

    def unit() -> None:
        batch = case["batch"] or len(rows)
        order = sorted(range(len(rows)), key=lambda index: case["rows"][index]["tokens"])
        for start in range(0, len(rows), batch):
            chosen = [rows[index] for index in order[start : start + batch]]
            prompts = encode_prompts(policy, [(row.images, user_text(row, STYLE, PRESET)) for row in chosen])
            generate(
                policy,
                prompts,
                group=case["group"],
                max_new_tokens=case["new_tokens"],
                temperature=0.0 if greedy else 1.0,
                seeds=None if greedy else list(range(len(chosen))),
            )

    return unit


def main() -> None:
    """Serve the case's work."""
    gate = Gate()
    folder, case = settings()
    if case["device"] == "cpu":
        keep_freed_memory()
    training = case["work"] in ("grpo", "sft")
    dtype = torch.float32 if training else getattr(torch, case["dtype"])
    policy = load_policy(folder / "model", dtype=dtype, device=case["device"])
    # End tokens are ordinary tokens here: every completion has the case's length, as on the other side.
    policy.model.generation_config.eos_token_id = [case["never"][-1]]
    works = {"grpo": grpo, "sft": sft, "rollout": written, "evaluate": written}
    unit = works[case["work"]](case, policy, examples(folder, case))
    gate.ready(**versions("torch", "transformers"))

    def finished() -> None:
        unit()
        synchronise(case["device"])

    gate.loop(finished)


if __name__ == "__main__":
    main()

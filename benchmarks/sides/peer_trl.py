"""TRL's GRPOTrainer and SFTTrainer, at the settings that are best for them."""

from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from serve import Gate, callback, settings
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


def common(folder: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What both trainers are told. Checkpointing and bfloat16 are on by default, and slower on a CPU."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 10**6,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": case["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": case["device"] == "cpu",
        "shuffle_dataset": False,
    }


def grpo(folder: Any, case: dict[str, Any], model: Any, gate: Gate) -> GRPOTrainer:
    """One group a prompt; every second completion is right, so that no group is without a signal."""
    rows = case["rows"]
    dataset = Dataset.from_dict(
        {
            "prompt": [
                [{"role": "user", "content": row["problem"].removeprefix("<image>") + case["suffix"]}] for row in rows
            ],
            "image": [str(folder / row["picture"]) for row in rows],
        }
    ).cast_column("image", ImageFeature())

    def reward(completions: list[Any], **_: Any) -> list[float]:
        zero = case.get("zero_groups", 0)
        values = [float(number % 2) for number in range(len(completions))]
        return [0.0 if number // case["group"] < zero else value for number, value in enumerate(values)]

    config = GRPOConfig(
        **common(folder, case),
        per_device_train_batch_size=case["prompts"] * case["group"],
        num_generations=case["group"],
        max_completion_length=case["new_tokens"],
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        generation_kwargs={"suppress_tokens": case["never"]},
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(folder / "model", padding_side="left"),
        callbacks=[callback(gate, TrainerCallback)],
    )


def sft(folder: Any, case: dict[str, Any], model: Any, gate: Gate) -> SFTTrainer:
    """Loss on the answer and its end token."""
    if case["frozen"]:
        model.model.visual.requires_grad_(False)
    rows = case["rows"]
    dataset = Dataset.from_dict(
        {
            "prompt": [
                [{"role": "user", "content": row["problem"].removeprefix("<image>") + case["suffix"]}] for row in rows
            ],
            "completion": [[{"role": "assistant", "content": row["answer"]}] for row in rows],
            "image": [str(folder / row["picture"]) for row in rows],
        }
    ).cast_column("image", ImageFeature())
    told = common(folder, case)
    del told["shuffle_dataset"]
    config = SFTConfig(**told, per_device_train_batch_size=case["prompts"], max_length=None, completion_only_loss=True)
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(folder / "model"),
        callbacks=[callback(gate, TrainerCallback)],
    )


def main() -> None:
    """Train until told to stop."""
    gate = Gate()
    folder, case = settings()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype="float32")
    {"grpo": grpo, "sft": sft}[case["work"]](folder, case, model, gate).train()


if __name__ == "__main__":
    main()

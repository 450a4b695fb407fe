"""LLaMA-Factory's SFT stage, its loop and data path as released; pictures are prepared in every step, as ours."""

import json
from typing import Any

from serve import Gate, callback, settings
from transformers import TrainerCallback


def write_data(folder: Any, case: dict[str, Any]) -> None:
    """The rows in its sharegpt form."""
    (folder / "lf").mkdir(exist_ok=True)
    rows = []
    for row in case["rows"] * 64:
        question = {"role": "user", "content": row["problem"] + case["suffix"]}
        rows.append(
            {
                "messages": [question, {"role": "assistant", "content": row["answer"]}],
                "images": [str(folder / row["picture"])],
            }
        )
    (folder / "lf" / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "tags": tags | {"system_tag": "system"}}
    entry["columns"] = {"messages": "messages", "images": "images"}
    (folder / "lf" / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")


def main() -> None:
    """Train until told to stop."""
    gate = Gate()
    folder, case = settings()
    write_data(folder, case)
    from llamafactory.train.tuner import run_exp

    told = {
        **{"model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": "full"},
        **{
            "freeze_vision_tower": case["frozen"],
            "freeze_multi_modal_projector": case["frozen"],
            "template": "qwen2_vl",
        },
        **{"dataset": "rows", "dataset_dir": str(folder / "lf"), "cutoff_len": 2048, "seed": 0},
        **{"output_dir": str(folder / "lf" / "out"), "overwrite_output_dir": True, "max_steps": 64},
        **{"per_device_train_batch_size": case["prompts"], "learning_rate": 1e-6, "lr_scheduler_type": "constant"},
        **{"optim": "adamw_torch_fused", "bf16": case["dtype"] == "bfloat16", "disable_gradient_checkpointing": True},
        **{"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
        **{"use_cpu": case["device"] == "cpu", "dataloader_num_workers": 0, "preprocessing_num_workers": 1},
    }
    run_exp(told, callbacks=[callback(gate, TrainerCallback)])


if __name__ == "__main__":
    main()

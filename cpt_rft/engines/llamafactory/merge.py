"""Adapters into weights, by the framework's own export."""

import json
import shutil
import subprocess
from pathlib import Path

from cpt_rft.engines.environment import environment_variables
from cpt_rft.errors import TrainingError


def merge_lora(environment: Path, directory: Path, start: Path, log: Path) -> Path:
    """Merge adapters by the framework's own export; returns the directory of the merged weights.

    Raises:
        TrainingError: It failed.
    """
    merged = directory / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    keys = {
        **{"model_name_or_path": str(start.absolute()), "adapter_name_or_path": "out", "template": "qwen2_vl"},
        **{"finetuning_type": "lora", "export_dir": "merged", "export_size": 5, "export_device": "cpu"},
        **{"infer_dtype": "float32", "trust_remote_code": False},
    }
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    (directory / "export.yaml").write_text(text, encoding="utf-8")
    variables = {**environment_variables(environment), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(environment / "bin" / "llamafactory-cli"), "export", "export.yaml"]
    with log.open("ab") as output:
        done = subprocess.run(command, cwd=directory, env=variables, stdout=output, stderr=output)
    if done.returncode:
        raise TrainingError("LLaMA-Factory could not merge the adapters.", f"see {log}")
    return merged

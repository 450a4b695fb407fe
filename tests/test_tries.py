"""The tries of a filter by vLLM, in its own environment."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_rft.config.engine import EasyR1Config, parse_engine
from cpt_rft.config.methods import GrpoMethod
from cpt_rft.engines.base import Stage
from cpt_rft.engines.local.rollouts import LocalAttempt
from cpt_rft.miniature.world import make_rows
from cpt_rft.sequence.tries import VllmAttempt
from eval.backends import BackendError
from tests.helpers.tree import ROOT

BASE = ROOT / "cpt_rft" / "miniature" / "base"


def stage_and_engine(
    directory: Path, environment: Path, *, temperature: float = 0.001, **changes: Any
) -> tuple[Stage, EasyR1Config]:
    """A stage whose filter is so cold that every try takes the likeliest token, as if on a GPU."""
    config = {"name": "easyr1", "device": "cuda", "dtype": "bfloat16", "processes": 1, "environment": str(environment)}
    engine = parse_engine({**config, **changes})
    assert isinstance(engine, EasyR1Config)
    stated = {"kind": "grpo", "name": "rif", "style": "cot", "lr": 1e-4, "prompts_per_step": 4, "micro_batch": 4}
    stated |= {"group": 4, "temperature": temperature, "max_new_tokens": 14, "max_prompt_tokens": 128}
    stated["filter"] = {"rollouts": 3, "rule": "drop_zero_correct"}
    method = GrpoMethod.model_validate_json(json.dumps(stated))
    return Stage(directory, BASE, BASE, ("mini_gqa",), (), method, engine, "miniature", 0, ("tries",)), engine


@pytest.mark.full  # 40 s
def test_vllm_makes_the_tries_of_the_local_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts must be equal, and end alike."""
    root = Path(os.environ.get("CPT_RFT_ENVS", ROOT / ".envs"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    stage, engine = stage_and_engine(tmp_path, max(root.glob("vllm-*/ready")).parent)
    rows = make_rows("mini_gqa", "train", 40, 0)
    attempt = VllmAttempt(stage, engine)
    attempt.vllm.dtype, attempt.vllm.engine = "float32", {"enforce_eager": True, "max_num_seqs": 64}
    try:
        theirs = attempt(rows)
    finally:
        attempt.close()
    ours = LocalAttempt(stage, torch.float32, "cpu")(rows)
    assert {len(tries) for tries in theirs} == {3}
    pairs = [pair for tries, others in zip(ours, theirs, strict=True) for pair in zip(tries, others, strict=True)]
    same = sum(one == other for one, other in pairs)
    assert same >= 0.97 * len(pairs)


def test_tries_without_a_gpu_are_sampled_as_the_engine_says(tmp_path: Path) -> None:
    """Hot tries are those of a cold filter where only the likeliest token is left to choose from."""
    rows = make_rows("mini_gqa", "train", 2, 0)
    hot, nucleus, cold = (
        LocalAttempt(
            stage_and_engine(tmp_path, tmp_path, device="cpu", dtype="float32", **changes)[0], torch.float32, "cpu"
        )(rows)
        for changes in ({"temperature": 3.0}, {"temperature": 3.0, "top_p": 1e-6}, {})
    )
    assert nucleus == cold != hot


def test_an_environment_without_vllm_is_one_clear_line(tmp_path: Path) -> None:
    attempt = VllmAttempt(*stage_and_engine(tmp_path, Path(sys.prefix)))
    with pytest.raises(BackendError, match="vLLM ended: ModuleNotFoundError: No module named 'vllm'"):
        attempt(make_rows("mini_gqa", "train", 2, 0))
    attempt.close()

"""The recipe of the base model: deterministic, resumable, and named by its hash."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from cpt_rft.checkpoint import load_policy, verify_checkpoint
from cpt_rft.errors import ConfigError
from cpt_rft.miniature import pretrain
from cpt_rft.miniature.corpus import Reading
from cpt_rft.miniature.pretrain import DEFAULT_CONFIG, DEFAULT_OUT, RECIPE_NAME, Phase, PretrainConfig, load_config
from cpt_rft.miniature.world import DRAWN

PHASES = (
    Phase(steps=2, direct_share=1.0, share={"mini_caption": 1.0, "mini_find": 1.0}),
    Phase(steps=3, direct_share=0.5, share=dict.fromkeys(DRAWN, 1.0)),
)
TINY = {"phases": PHASES, "rows_per_step": 4, "vocab_size": 400, "corpus_rows": 20, "save_every": 2, "dtype": "float32"}


@pytest.fixture
def config() -> PretrainConfig:
    return load_config(DEFAULT_CONFIG).model_copy(update=TINY)


def test_the_same_recipe_gives_the_same_bytes(config: PretrainConfig, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pretrain.pretrain(config, tmp_path / name, tmp_path / f"{name}.work")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    verify_checkpoint(tmp_path / "a")


def test_an_interrupted_run_ends_with_the_same_bytes(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.pretrain(config, tmp_path / "whole", tmp_path / "whole.work")
    drawn, steps = pretrain.rows_of_step, []

    def interrupted(config: PretrainConfig, step: int) -> list[Reading]:
        steps.append(step)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return drawn(config, step)

    monkeypatch.setattr(pretrain, "rows_of_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config, tmp_path / "cut", tmp_path / "cut.work")
    assert not (tmp_path / "cut").exists()
    pretrain.pretrain(config, tmp_path / "cut", tmp_path / "cut.work")
    assert steps == [0, 1, 2, 3, 2, 3, 4]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "cut.work").exists()


def test_rows_of_a_step_depend_on_seed_and_step_alone(config: PretrainConfig) -> None:
    def texts(seed: int, step: int) -> list[str]:
        rows = pretrain.rows_of_step(config.model_copy(update={"seed": seed}), step)
        return [row.user + row.target + row.pictures[0].tobytes().hex() for row in rows if row.pictures]

    assert texts(0, 3) == texts(0, 3)
    assert texts(0, 3) != texts(0, 4)
    assert texts(0, 3) != texts(1, 3)


def test_each_phase_draws_from_its_own_mixture(config: PretrainConfig) -> None:
    ends = [config.phase_of(step) for step in range(config.steps)]
    assert ends == [PHASES[0]] * 2 + [PHASES[1]] * 3
    rows = pretrain.rows_of_step(config.model_copy(update={"rows_per_step": 40}), 1)
    assert {row.user.removeprefix("<image>").split()[0] for row in rows} == {"Find", "List"}


def test_the_loss_is_that_of_the_stock_model(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain.pretrain(config, tmp_path / "base", tmp_path / "work")
    policy = load_policy(tmp_path / "base")
    row = next(row for row in pretrain.rows_of_step(config, 0) if row.pictures)
    loss = pretrain.step_loss(policy, pretrain.Network(policy.model), [row])
    prompt = pretrain.encode_prompts(policy, [(row.pictures, row.user)])[0]
    target = policy.tokenizer.encode(row.target + "<|im_end|>", add_special_tokens=False)
    ids = torch.cat([prompt.ids, torch.tensor(target)])[None]
    out = policy.model(
        input_ids=ids,
        labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt.ids), -100),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
    )
    torch.testing.assert_close(loss, out.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stpes": 3}, "stpes"),
        ({"phases": []}, "phases"),
        ({"phases": [{"steps": 0, "direct_share": 0.5, "share": {"mini_gqa": 1.0}}]}, "steps"),
        ({"phases": [{"steps": 1, "direct_share": 0.5, "share": {"mini_gga": 1.0}}]}, "mini_gga"),
        ({"phases": [{"steps": 1, "direct_share": 0.5, "share": {"mini_gqa": 0.0}}]}, "share"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(DEFAULT_CONFIG.read_text()), **change}))
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(path)
    assert "recipe.yaml" in str(caught.value)


def test_the_shipped_base_names_the_recipe_in_the_repository() -> None:
    recipe = json.loads((DEFAULT_OUT / RECIPE_NAME).read_text())
    assert recipe["recipe_sha256"] == load_config(DEFAULT_CONFIG).recipe_hash
    assert recipe["weights_sha256"] == pretrain.weights_hash(load_policy(DEFAULT_OUT).model.state_dict())
    size = sum(path.stat().st_size for path in DEFAULT_OUT.iterdir())
    assert size <= 16 * 2**20

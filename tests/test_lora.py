"""Adapters: peft's own model is the measure; what is published is merged; what later stages need is left."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt_rft.algos.o_lora import orthogonality_penalty
from cpt_rft.checkpoint import Policy, load_policy
from cpt_rft.config.restraints import Lora
from cpt_rft.data.example import Example
from cpt_rft.engines.base import ARTEFACTS_NAME, EarlierStage, Stage
from cpt_rft.engines.local.generate import generate
from cpt_rft.engines.local.lora import ADAPTER_NAME, Adapter, read_down
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.packing import pack_blocks
from cpt_rft.engines.local.restrain import Orthogonality
from cpt_rft.miniature.world import make_rows
from tests.helpers.engine import TASK, grpo, make_base, make_stage, random_prompt, run, sft, stock_inputs, weights
from tests.helpers.killed import train_and_die

LORA = Lora(rank=3, alpha=6.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
SOME: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "up_proj")}
ARMS = pytest.mark.parametrize("arm", [sft, grpo], ids=["sft", "grpo"])


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return make_rows(TASK, "train", 8, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("lora") / "base", scale=2.0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: its KL moves a policy that earns no reward."""
    return make_base(tmp_path_factory.mktemp("lora") / "reference", scale=2.0, seed=1)


def adapted(base: Path, settings: Lora = LORA, seed: int = 0) -> tuple[Policy, Adapter]:
    """A policy whose adapters are not zero."""
    policy = load_policy(base)
    adapter = Adapter(policy.model, settings, seed)
    generator = torch.Generator().manual_seed(1)
    for name, weight in trained(policy):
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return policy, adapter


def trained(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight) for name, weight in policy.model.named_parameters() if weight.requires_grad)


def test_the_packed_path_with_adapters_is_that_of_peft(base: Path) -> None:
    """Forward and backward of peft's own modules inside the stock model, a row a completion."""
    policy, _ = adapted(base)
    prompts = [random_prompt(policy, 3, 9, (6, 6), seed=1), random_prompt(policy, 5, 4, seed=2)]
    groups = [[[5, 6, 7], [9]], [[1, 2], [3, 4, 5, 6]]]
    network = Network(policy.model)
    contexts = network.contexts(prompts)
    logits = network.logits(contexts, pack_blocks(contexts, groups))
    stock = [
        policy.model(**stock_inputs(policy, prompt, tokens)).logits[0][len(prompt.ids) - 1 : -1]
        for prompt, group in zip(prompts, groups, strict=True)
        for tokens in group
    ]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for each in (logits, expected := torch.cat(stock)):
        policy.model.zero_grad()
        (each * weight).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trained(policy)})
    scale = float(expected.detach().abs().max())
    assert (logits - expected).abs().max() <= 1e-5 * scale
    assert len(gradients[0]) == 2 * 7 * 2
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert ours is not None and theirs is not None
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()), name
        assert theirs.count_nonzero() > 0
    assert all(parameter.grad is None for name, parameter in policy.model.named_parameters() if ".lora_" not in name)


def test_decoding_goes_through_the_adapters(base: Path) -> None:
    policy, adapter = adapted(base)
    prompt = random_prompt(policy, 3, 9, (6, 6), seed=1)
    with torch.no_grad():
        merged = load_policy(base)
        merged.model.load_state_dict(
            adapter.merged(dict(merged.model.named_parameters()), dict(trained(policy))), strict=False
        )
    one, other, plain = (
        generate(each, [prompt], max_new_tokens=6, temperature=0.0)[0][0]
        for each in (policy, merged, load_policy(base))
    )
    assert one.token_ids == other.token_ids
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert one.logprobs != pytest.approx(plain.logprobs, abs=1e-3)


def test_what_is_merged_is_what_peft_merges(base: Path) -> None:
    policy, adapter = adapted(base)
    ours = adapter.merged(weights(base), dict(trained(policy)))
    checked = 0
    for name, module in policy.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            expected = module.base_layer.weight + module.get_delta_weight("default")
            torch.testing.assert_close(ours[f"{name}.weight"], expected.detach(), rtol=1e-5, atol=1e-6)
            checked += 1
    assert checked == 14
    assert all(torch.equal(ours[name], weight) for name, weight in weights(base).items() if "embed" in name)


def test_adapters_begin_as_the_seed_says_and_change_nothing(base: Path) -> None:
    one, other, third = (Adapter(load_policy(base).model, LORA, seed) for seed in (0, 0, 1))
    for layer, down in one.down.items():
        assert torch.equal(down, other.down[layer]) and not torch.equal(down, third.down[layer])
    policy = load_policy(base)
    start = weights(base)
    merged = Adapter(policy.model, LORA, 0).merged(start, dict(trained(policy)))
    assert all(torch.equal(weight, start[name]) for name, weight in merged.items())


def test_the_picture_tower_has_no_adapter(base: Path) -> None:
    _, adapter = adapted(base, Lora(rank=1, alpha=1.0, targets=("gate_proj",)))
    assert sorted(adapter.down) == [f"model.language_model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)]


@ARMS
def test_a_stage_with_adapters_publishes_a_plain_checkpoint(
    base: Path, reference: Path, rows: list[Example], tmp_path: Path, arm: Any
) -> None:
    """And leaves the adapters in the form that peft loads onto the stage's parent."""
    from peft import PeftModel

    stage = make_stage(tmp_path / "stage", reference, arm(lora=SOME, lr=1e-2, weight_decay=0.1), rows, parent=base)
    run(stage)
    start, end = weights(base), weights(stage.directory / "checkpoint")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    layers = [f"model.language_model.layers.{layer}" for layer in (0, 1)]
    assert changed == {f"{at}.{part}.weight" for at in layers for part in ("self_attn.q_proj", "mlp.up_proj")}
    policy, published = load_policy(base), load_policy(stage.directory / "checkpoint")
    peft = PeftModel.from_pretrained(policy.model, stage.directory / ARTEFACTS_NAME / ADAPTER_NAME)
    inputs = stock_inputs(published, random_prompt(published, 4, 4, (6, 6)), [1, 2])
    torch.testing.assert_close(peft(**inputs).logits, published.model(**inputs).logits, rtol=1e-4, atol=1e-5)


def second(stage: Stage, directory: Path, settings: dict[str, Any], rows: list[Example], **method: Any) -> Stage:
    made = make_stage(directory, stage.base, sft(lora=settings, **method), rows, parent=stage.directory / "checkpoint")
    return replace(made, history=(EarlierStage(stage.tasks, stage.data, stage.directory / ARTEFACTS_NAME),))


def test_o_lora_keeps_out_of_earlier_directions(base: Path, rows: list[Example], tmp_path: Path) -> None:
    strict = SOME | {"orthogonality": 1.0}
    first = make_stage(tmp_path / "first", base, sft(lora=strict, lr=1e-2), rows)
    assert {log.penalty for log in run(first)} == {None}
    earlier = read_down(first.directory / ARTEFACTS_NAME / ADAPTER_NAME)
    shared = {}
    for strength in (1e-6, 1.0):
        stage = second(first, tmp_path / str(strength), SOME | {"orthogonality": strength}, rows, lr=1e-2, epochs=4)
        logs = run(stage)
        down = read_down(stage.directory / ARTEFACTS_NAME / ADAPTER_NAME)
        shared[strength] = sum(float(orthogonality_penalty([earlier[layer]], down[layer])) for layer in down)
        assert logs[0].penalty is not None and logs[0].penalty > 0
    assert shared[1.0] < 0.8 * shared[1e-6]


def test_the_penalty_of_o_lora_is_summed_over_layers_and_stages(base: Path) -> None:
    policy, adapter = adapted(base, Lora(**SOME))
    generator = torch.Generator().manual_seed(0)
    earlier = [
        {layer: torch.randn(down.shape, generator=generator) for layer, down in adapter.down.items()} for _ in range(2)
    ]
    value = Orthogonality(adapter, earlier, 0.5).gradients([], lambda loss: loss.backward())
    total = sum(
        float((each[layer] @ down.detach().T).abs().sum()) for each in earlier for layer, down in adapter.down.items()
    )
    assert value == pytest.approx(0.5 * total, rel=1e-5)
    assert all((weight.grad is not None) == (".lora_A." in name) for name, weight in policy.model.named_parameters())


@pytest.mark.parametrize(("arm", "dtype"), [(sft, "bfloat16"), (grpo, "float32")], ids=["sft", "grpo"])
def test_a_killed_stage_with_adapters_ends_with_the_same_bits(
    base: Path, reference: Path, rows: list[Example], tmp_path: Path, arm: Any, dtype: str
) -> None:
    method, engine = arm(lora=SOME, epochs=3, lr=1e-2), {"dtype": dtype, "save_every": 2}
    whole = make_stage(tmp_path / "whole", reference, method, rows, parent=base, **engine)
    run(whole)
    stage = make_stage(tmp_path / "killed", reference, method, rows, parent=base, **engine)
    train_and_die(stage, at=4)
    assert [log.step for log in run(stage)] == [3, 4, 5, 6]
    for name in ("checkpoint/model.safetensors", f"{ARTEFACTS_NAME}/{ADAPTER_NAME}/adapter_model.safetensors"):
        assert (whole.directory / name).read_bytes() == (stage.directory / name).read_bytes()

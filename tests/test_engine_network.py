"""The packed network against the stock model: nothing may change but the time."""

from functools import partial

import pytest
import torch
from torch import Tensor

from cpt_rft.checkpoint import EncodedPrompt, Policy, load_policy
from cpt_rft.engines.local.layers import rms_norm
from cpt_rft.engines.local.network import Network, pad, unpad
from cpt_rft.engines.local.packing import Images, pack_blocks, rope_positions
from cpt_rft.engines.local.vision import VisionTower
from cpt_rft.errors import CheckpointError
from tests.helpers.engine import make_base, random_prompt, stock_inputs


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(make_base(tmp_path_factory.mktemp("network") / "base", scale=4.0))


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[EncodedPrompt]:
    """One size of picture, another with several windows, no picture, two pictures."""
    return [
        random_prompt(policy, 3, 20, (6, 6), seed=1),
        random_prompt(policy, 5, 4, (6, 6), seed=2),
        random_prompt(policy, 2, 9, (10, 20), seed=3),
        random_prompt(policy, 6, 3, seed=4),
        random_prompt(policy, 1, 5, (6, 6), (4, 8), seed=5),
    ]


def completions(prompts: list[EncodedPrompt], group: int) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(group)

    def one() -> list[int]:
        length = int(torch.randint(1, 8, (1,), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    return [[one() for _ in range(group)] for _ in prompts]


def stock_logits(policy: Policy, prompts: list[EncodedPrompt], groups: list[list[list[int]]]) -> Tensor:
    """The stock model, one row a completion, nothing shared and nothing padded."""
    rows = []
    for prompt, group in zip(prompts, groups, strict=True):
        for tokens in group:
            logits = policy.model(**stock_inputs(policy, prompt, tokens)).logits[0]
            rows.append(logits[len(prompt.ids) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("group", [1, 3])
def test_logits_and_gradients_are_those_of_the_stock_model(
    policy: Policy, prompts: list[EncodedPrompt], group: int
) -> None:
    groups = completions(prompts, group)
    network = Network(policy.model)
    contexts = network.contexts(prompts)
    logits = network.logits(contexts, pack_blocks(contexts, groups))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for each in (logits, expected := stock_logits(policy, prompts, groups)):
        policy.model.zero_grad()
        (each * weight).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in policy.model.named_parameters()})
    assert expected.detach().std() > 0.5  # the comparison is not of zeros
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert ours is not None and theirs is not None, name
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_sharing_equals_the_stock_model_on_a_padded_batch(
    policy: Policy, prompts: list[EncodedPrompt], side: str
) -> None:
    """One row a completion, all rows of one width; the stock model makes its rotary positions itself."""
    groups = completions(prompts, 3)
    network = Network(policy.model)
    contexts = network.contexts(prompts)
    logits = network.logits(contexts, pack_blocks(contexts, groups))
    expected = padded_logits(policy, prompts, groups, side)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for each in (logits, expected):
        policy.model.zero_grad()
        (each * weight).sum().backward()
        gradients.append({name: each.grad for name, each in policy.model.named_parameters() if each.grad is not None})
    assert expected.detach().std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys() == dict(policy.model.named_parameters()).keys()
    for name, theirs in gradients[1].items():
        assert (gradients[0][name] - theirs).norm() <= 1e-4 * theirs.norm(), name


def padded_logits(policy: Policy, prompts: list[EncodedPrompt], groups: list[list[list[int]]], side: str) -> Tensor:
    """Logits that predict the completions, by the stock model over one padded batch."""
    rows = [(prompt, torch.tensor(tokens)) for prompt, group in zip(prompts, groups, strict=True) for tokens in group]
    width = max(len(prompt.ids) + len(tokens) for prompt, tokens in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    ends = []
    for number, (prompt, tokens) in enumerate(rows):
        length = len(prompt.ids) + len(tokens)
        start = width - length if side == "left" else 0
        ids[number, start : start + length] = torch.cat([prompt.ids, tokens])
        mask[number, start : start + length] = 1
        ends.append(start + length)
    pictured = [prompt for prompt, _ in rows if prompt.pixel_values is not None]
    policy.model.model.rope_deltas = None
    logits = policy.model(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
        pixel_values=torch.cat([prompt.pixel_values for prompt in pictured if prompt.pixel_values is not None]),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in pictured if prompt.image_grid_thw is not None]),
    ).logits
    return torch.cat(
        [
            logits[n, end - len(tokens) - 1 : end - 1]
            for n, (end, (_, tokens)) in enumerate(zip(ends, rows, strict=True))
        ]
    )


def test_checkpointing_keeps_less_and_changes_no_gradient(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    groups = completions(prompts, 4)
    decoder = policy.model.model.language_model
    seen: list[tuple[dict[str, Tensor | None], int]] = []
    for recompute in (False, True):
        decoder.gradient_checkpointing = recompute
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        policy.model.zero_grad()
        network = Network(policy.model)
        contexts = network.contexts(prompts)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = network.logits(contexts, pack_blocks(contexts, groups))
            size = sum(kept.values())
        logits.square().mean().backward()
        seen.append(({name: weight.grad for name, weight in policy.model.named_parameters()}, size))
    decoder.gradient_checkpointing = False
    weights = sum(weight.nbytes for weight in policy.model.parameters())
    assert seen[1][1] - weights < 0.8 * (seen[0][1] - weights)
    for name, gradient in seen[0][0].items():
        other = seen[1][0][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name


def test_rows_do_not_see_each_other(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    groups = completions(prompts, 2)
    network = Network(policy.model)
    with torch.no_grad():
        contexts = network.contexts(prompts)
        together = network.logits(contexts, pack_blocks(contexts, groups))
        alone = []
        for prompt, group in zip(prompts, groups, strict=True):
            for tokens in group:
                contexts = network.contexts([prompt])
                alone.append(network.logits(contexts, pack_blocks(contexts, [[tokens]])))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)


def test_rope_positions_are_those_of_the_stock_model(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    image = policy.model.config.image_token_id
    for prompt in prompts:
        ids = prompt.ids[None]
        stock, _ = policy.model.model.get_rope_index(
            ids,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(ids == image).int(),
        )
        assert torch.equal(rope_positions(prompt, image, 2), stock[:, 0])


def test_moving_pictures_are_refused(policy: Policy) -> None:
    prompt = random_prompt(policy, 1, 2, (6, 6))
    film = (
        prompt._replace()
        if hasattr(prompt, "_replace")
        else EncodedPrompt(prompt.ids, prompt.pixel_values, torch.tensor([[2, 6, 3]]))
    )
    with pytest.raises(ValueError, match="one frame"):
        rope_positions(film, policy.model.config.image_token_id, 2)


@pytest.mark.parametrize("grids", [[(6, 6)] * 3, [(16, 16)], [(6, 6), (18, 10), (6, 6), (2, 30)]])
def test_picture_tokens_are_those_of_the_stock_tower(policy: Policy, grids: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(rows * columns for rows, columns in grids), 1176, generator=generator)
    thw = [(1, rows, columns) for rows, columns in grids]
    tower = VisionTower(policy.model.model.visual, policy.model.config.vision_config)
    with torch.no_grad():
        expected = policy.model.model.get_image_features(patches, torch.tensor(thw), return_dict=True).pooler_output
        torch.testing.assert_close(tower(Images(patches, thw)), torch.cat(list(expected)), rtol=0, atol=2e-5)


def test_padding_and_unpadding_are_adjoint() -> None:
    slots = torch.tensor([0, 3, 4])
    x, y = torch.randn(3, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    torch.testing.assert_close((pad(x, slots, 6) * y).sum(), (x * unpad(y, slots)).sum())
    assert torch.autograd.gradcheck(lambda z: pad(z, slots, 6), (x.double(),))
    assert torch.autograd.gradcheck(lambda z: unpad(z, slots), (y.double(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_norm_is_the_one_autograd_finds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (3.0 * torch.randn(4, 5, 48, generator=generator).to(dtype) for _ in range(2))
    norm = torch.nn.RMSNorm(48, eps=1e-3, dtype=dtype)
    norm.variance_epsilon = norm.eps
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
    found = []
    for function in (norm, partial(rms_norm, norm=norm)):
        leaf = x.clone().requires_grad_()
        found.append((function(leaf), *torch.autograd.grad(function(leaf), (leaf, norm.weight), grad)))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, **close)


def test_a_norm_that_is_not_trained_gets_no_gradient() -> None:
    norm = torch.nn.RMSNorm(8)
    norm.variance_epsilon = 1e-6
    norm.weight.requires_grad_(False)
    rms_norm(x := torch.randn(3, 8, requires_grad=True), norm).sum().backward()
    assert x.grad is not None and norm.weight.grad is None


def test_bfloat16_stays_close(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    groups = completions(prompts, 2)
    half = load_policy(policy.directory, dtype=torch.bfloat16)
    with torch.no_grad():
        both = []
        for model in (policy.model, half.model):
            network = Network(model)
            contexts = network.contexts(prompts)
            both.append(network.logits(contexts, pack_blocks(contexts, groups)).float())
    assert (both[0] - both[1]).abs().mean() < 0.02 * both[0].abs().mean()


@pytest.mark.parametrize(("key", "value"), [("use_sliding_window", True), ("hidden_act", "gelu")])
def test_what_is_not_computed_is_refused(policy: Policy, key: str, value: object) -> None:
    text = policy.model.config.text_config
    kept = getattr(text, key)
    setattr(text, key, value)
    try:
        with pytest.raises(CheckpointError, match=f"does not compute {key}"):
            Network(policy.model)
    finally:
        setattr(text, key, kept)

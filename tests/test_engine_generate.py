"""Generation against the stock `generate`, the network's own log-probabilities, and arithmetic."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.checkpoint import EncodedPrompt, Policy, load_policy, vision_token_ids
from cpt_rft.engines.local.generate import Completion, end_token_ids, generate, nucleus, suppression
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.packing import pack_blocks
from tests.helpers.engine import make_base, random_prompt, stock_inputs


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(make_base(tmp_path_factory.mktemp("generate") / "base", scale=4.0))


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[EncodedPrompt]:
    shapes = [(3, 20, (6, 6)), (5, 4, (6, 6)), (2, 9, (10, 8)), (6, 3)]
    return [random_prompt(policy, *shape[:2], *shape[2:], seed=seed) for seed, shape in enumerate(shapes)]


@contextmanager
def favoured(policy: Policy, tokens: list[int], strength: float) -> Iterator[None]:
    """Raise the logits of some tokens everywhere: one coordinate is large for every token, and the head reads it."""
    head, embedding = policy.model.lm_head.weight, policy.model.model.language_model.embed_tokens.weight
    kept = head.detach().clone(), embedding.detach().clone()
    with torch.no_grad():
        embedding[:, 0] += 50.0
        head[:, 0] = 0.0
        head[tokens, 0] = strength
    try:
        yield
    finally:
        with torch.no_grad():
            head.copy_(kept[0])
            embedding.copy_(kept[1])


def test_greedy_is_that_of_the_stock_model(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    ours = generate(policy, prompts, max_new_tokens=10, temperature=0)
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        stock = policy.model.generate(
            **stock_inputs(policy, prompt, []),
            max_new_tokens=10,
            do_sample=False,
            suppress_tokens=vision_token_ids(policy),
        )
        assert completion.token_ids == stock[0, len(prompt.ids) :].tolist()
        assert completion.finish == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_update(policy: Policy, prompts: list[EncodedPrompt], temperature: float) -> None:
    seeds = list(range(len(prompts)))
    groups = generate(policy, prompts, group=3, max_new_tokens=8, temperature=temperature, seeds=seeds)
    network = Network(policy.model)
    contexts = network.contexts(prompts)
    blocks = pack_blocks(contexts, [[each.token_ids for each in group] for group in groups])
    with torch.no_grad():
        logits = network.logits(contexts, blocks) + suppression(policy, network.device)
    scored = token_logprobs(logits, blocks.targets, temperature=temperature or 1.0)
    sampled = torch.tensor([value for group in groups for each in group for value in each.logprobs])
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-5)


def test_completions_do_not_depend_on_the_batch(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    seeds = [11, 12, 13, 14]

    def tokens(order: list[int]) -> dict[int, list[list[int]]]:
        groups = generate(
            policy,
            [prompts[index] for index in order],
            group=3,
            max_new_tokens=8,
            temperature=1.2,
            seeds=[seeds[index] for index in order],
        )
        return {index: [each.token_ids for each in group] for index, group in zip(order, groups, strict=True)}

    together = tokens([0, 1, 2, 3])
    assert tokens([2, 0, 3, 1]) == together
    for index in range(4):
        assert tokens([index])[index] == together[index]
    assert len({tuple(map(tuple, group)) for group in together.values()}) == 4
    assert all(len({tuple(each) for each in group}) == 3 for group in together.values())


def test_a_longer_limit_only_adds_tokens(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    short, long = (
        generate(policy, prompts[:2], group=2, max_new_tokens=limit, temperature=1.0, seeds=[1, 2]) for limit in (4, 9)
    )
    for one, other in zip(short, long, strict=True):
        assert [each.token_ids[:4] for each in other] == [each.token_ids for each in one]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_vision_token_is_never_written(policy: Policy, prompts: list[EncodedPrompt], temperature: float) -> None:
    """Even by a model that wants nothing else."""
    banned = vision_token_ids(policy)
    with favoured(policy, banned, 30.0):
        stock = policy.model.generate(**stock_inputs(policy, prompts[3], []), max_new_tokens=3, do_sample=False)
        assert set(stock[0, len(prompts[3].ids) :].tolist()) <= set(banned)
        groups = generate(policy, prompts, group=8, max_new_tokens=12, temperature=temperature, seeds=[1, 2, 3, 4])
    written = {token for group in groups for each in group for token in each.token_ids}
    assert written and not written & set(banned)
    assert all(value > float("-inf") for group in groups for each in group for value in each.logprobs)


def test_an_end_token_ends_a_completion(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """Some stop early and leave the batch; the others go on as if they had always been alone."""
    ends = end_token_ids(policy).tolist()
    with favoured(policy, ends, 0.3):
        groups = generate(policy, prompts, group=6, max_new_tokens=12, temperature=1.0, seeds=[1, 2, 3, 4])
        alone = generate(policy, prompts[1:2], group=6, max_new_tokens=12, temperature=1.0, seeds=[2])
    completions = [each for group in groups for each in group]
    assert [each.token_ids for each in alone[0]] == [each.token_ids for each in groups[1]]
    assert len({len(each.token_ids) for each in completions}) > 2
    for each in completions:
        stopped = each.token_ids[-1] in ends
        assert each.finish == ("stop" if stopped else "length")
        assert stopped or len(each.token_ids) == 12
        assert not set(each.token_ids[:-1]) & set(ends)
        assert len(each.logprobs) == len(each.token_ids)


def test_completions_that_are_done_leave_the_batch(
    policy: Policy, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer and fewer are read; the log-probabilities of what they wrote stay those of the update."""
    read: list[int] = []
    decode = Network.decode

    def counted(network: Network, ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        read.append(len(ids))
        return decode(network, ids, *arguments)

    monkeypatch.setattr(Network, "decode", counted)
    with favoured(policy, end_token_ids(policy).tolist(), 0.3):
        groups = generate(policy, prompts, group=6, max_new_tokens=30, temperature=1.0, seeds=[1, 2, 3, 4])
        network = Network(policy.model)
        contexts = network.contexts(prompts)
        blocks = pack_blocks(contexts, [[each.token_ids for each in group] for group in groups])
        with torch.no_grad():
            logits = network.logits(contexts, blocks) + suppression(policy, network.device)
    assert read[0] == 24 and read == sorted(read, reverse=True) and len(set(read)) > 2
    sampled = torch.tensor([value for group in groups for each in group for value in each.logprobs])
    torch.testing.assert_close(sampled, token_logprobs(logits, blocks.targets), rtol=0, atol=1e-4)


def test_samples_follow_the_distribution(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """One token, 20,000 draws from one seed: frequencies within five standard errors of the probabilities."""
    draws = 20_000
    (group,) = generate(policy, prompts[3:], group=draws, max_new_tokens=1, temperature=1.5, seeds=[5])
    counts = Counter(each.token_ids[0] for each in group)
    logits = policy.model(**stock_inputs(policy, prompts[3], [])).logits[0, -1].detach()
    shares = ((logits + suppression(policy, logits.device)) / 1.5).softmax(-1).double()
    for token, share in enumerate(shares.tolist()):
        error = (share * (1 - share) / draws) ** 0.5
        assert abs(counts[token] / draws - share) <= 5 * error + 1 / draws


def test_broken_numbers_end_the_completion(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    head = policy.model.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        ((one,),) = generate(policy, prompts[:1], max_new_tokens=5, temperature=temperature, seeds=[1])
        assert one.token_ids == end_token_ids(policy)[:1].tolist()
        assert one.logprobs[0] != one.logprobs[0]
    with torch.no_grad():
        head.copy_(kept)


@pytest.mark.parametrize("seeds", [None, [1]])
def test_sampling_needs_a_seed_a_prompt(policy: Policy, prompts: list[EncodedPrompt], seeds: list[int] | None) -> None:
    with pytest.raises(ValueError, match="one seed a prompt"):
        generate(policy, prompts, max_new_tokens=2, temperature=1.0, seeds=seeds)


def test_completions_are_plain_python(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    ((completion,),) = generate(policy, prompts[:1], max_new_tokens=2, temperature=0)
    assert isinstance(completion, Completion)
    assert all(type(token) is int for token in completion.token_ids)
    assert all(type(value) is float for value in completion.logprobs)


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    inside = nucleus(shares.log(), 0.74).exp()
    expected = torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0], [1.0, 0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]])
    torch.testing.assert_close(inside, expected)
    assert nucleus(shares.log(), 0.76).isneginf().sum(-1).tolist() == [1, 3, 0]


def test_top_p_keeps_samples_within_the_nucleus(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """A nucleus of one token is greedy decoding; its log-probability within the nucleus is 0."""
    greedy = generate(policy, prompts, max_new_tokens=6, temperature=0)
    seeds = list(range(len(prompts)))
    narrow = generate(policy, prompts, max_new_tokens=6, temperature=1.0, top_p=1e-9, seeds=seeds)
    assert [row[0].token_ids for row in narrow] == [row[0].token_ids for row in greedy]
    assert {logprob for row in narrow for logprob in row[0].logprobs} == {0.0}
    every = generate(policy, prompts, max_new_tokens=6, temperature=3.0, seeds=seeds)
    assert [row[0].token_ids for row in every] != [row[0].token_ids for row in greedy]

"""Completions of prompts, for training and for evaluation alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cpt_rft.checkpoint import EncodedPrompt, Policy, vision_token_ids
from cpt_rft.engines.local.network import Cache, Network
from cpt_rft.engines.local.packing import Contexts

KEEP_ABOVE = 0.75  # share of unfinished rows above which the batch is left as it is


class Completion(NamedTuple):
    """What the model wrote.

    Attributes:
        token_ids: The tokens, with the end token if it came.
        logprobs: Their log-probabilities under the distribution they came from: vision tokens excluded, at the
            sampling temperature (1 for greedy decoding), within the nucleus.
        finish: ``stop`` at an end token, ``length`` at the limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    *,
    group: int = 1,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """Write ``group`` completions for each prompt.

    A prompt and its pictures are processed once for its whole group, and finished completions leave the batch.
    Each prompt draws from its own seed, so that its completions do not depend on the prompts beside it.

    Args:
        policy: The model; a vision token has no probability, whatever its logit.
        prompts: At least one.
        group: Completions a prompt.
        max_new_tokens: Tokens a completion, the end token among them.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sampling is among the likeliest tokens that reach this share together; 1 is among all.
        seeds: One a prompt; needed above temperature 0.

    Raises:
        ValueError: Seeds are missing, or not one a prompt.
    """
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed a prompt")
    network = Network(policy.model)
    device = str(network.device)
    contexts = network.contexts(prompts)
    state = _begin(network, contexts, group, max_new_tokens)
    rows = state.alive
    draws = _uniform(seeds, group, max_new_tokens).to(device) if seeds is not None and temperature > 0 else None
    ends = end_token_ids(policy, device)
    banned = suppression(policy, network.device)
    written = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    lengths = torch.full((len(rows),), max_new_tokens, device=device)
    stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        bias = state.bias[..., : contexts.width + step + 1]
        logits = network.decode(state.tokens, state.positions + step, state.contexts, state.own, step, bias)
        logits = logits.float() + banned
        tokens, chosen = _choose(logits, temperature, top_p, None if draws is None else draws[state.alive, step])
        # Without numbers there is no choice: the completion ends, and the loss on it is not finite either.
        tokens = torch.where(chosen.isnan(), ends[0], tokens)
        written[state.alive, step] = tokens
        logprobs[state.alive, step] = chosen
        ended = torch.isin(tokens, ends) & ~stopped[state.alive]
        finished = state.alive[ended]
        lengths[finished], stopped[finished] = step + 1, True
        going = ~stopped[state.alive]
        following = state.advance(tokens, going)
        if following is None:
            break
        state = following
    return _completions(written, logprobs, lengths, stopped, group)


def _completions(
    written: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor, group: int
) -> list[list[Completion]]:
    """Cut every row to its length and gather the rows of each prompt."""
    columns = (written.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist())
    rows = [
        Completion(ids[:n], logps[:n], "stop" if stop else "length")
        for ids, logps, n, stop in zip(*columns, strict=True)
    ]
    return [rows[start : start + group] for start in range(0, len(rows), group)]


def _begin(network: Network, contexts: Contexts, group: int, room: int) -> "_Decoding":
    """Every completion before its first token, ``group`` a prompt; each prompt is computed once."""
    device, rows = contexts.ids.device, contexts.rows
    columns = torch.arange(contexts.width + room, device=device)
    empty = columns < (contexts.width - contexts.lengths)[:, None]
    bias = torch.zeros(empty.shape, device=device).masked_fill_(empty, float("-inf"))
    return _Decoding(
        alive=torch.arange(rows * group, device=device),
        contexts=network.prefill(contexts),
        own=network.empty(rows, group, room),
        bias=bias[:, None, None, None, None],
        positions=contexts.last_positions.repeat_interleave(group),
        tokens=contexts.last_ids.repeat_interleave(group),
    )


def suppression(policy: Policy, device: torch.device) -> Tensor:
    """(V,) zeros, with -inf at every token that must never be written; added to logits in rollout and in training."""
    bias = torch.zeros(policy.model.config.text_config.vocab_size, device=device)
    bias[vision_token_ids(policy)] = float("-inf")
    return bias


def end_token_ids(policy: Policy, device: str | torch.device = "cpu") -> Tensor:
    """The tokens that end a completion, as the checkpoint's generation configuration names them."""
    ends = policy.model.generation_config.eos_token_id
    return torch.tensor(ends if isinstance(ends, list) else [ends], device=device)


@dataclass(frozen=True)
class _Decoding:
    """The completions in the batch, equally many a prompt: those still being written, and a few that are done.

    Attributes:
        alive: (R * G,) their places among all completions.
        contexts: Keys and values of their prompts, one cache a layer.
        own: Keys and values of what they wrote, one cache a layer.
        bias: (R, 1, 1, 1, 1, columns) zero on real columns, -inf on padding.
        positions: (R * G,) rotary position of the first token after the context.
        tokens: (R * G,) the token to be read next.
    """

    alive: Tensor
    contexts: list[Cache]
    own: list[Cache]
    bias: Tensor
    positions: Tensor
    tokens: Tensor

    def advance(self, tokens: Tensor, going: Tensor) -> "_Decoding | None":
        """The state for the next token, or none if nothing is going on.

        Completions that are done leave once they are many enough to be worth a copy. Every prompt keeps equally many:
        one with more is held twice, and places that are left over get a completion that is done, whose tokens no one
        reads any more.
        """
        prompts, group = len(self.bias), going.numel() // len(self.bias)
        flags = going.view(prompts, group).tolist()
        left = [[row * group + place for place in range(group) if flags[row][place]] for row in range(prompts)]
        if not any(left):
            return None
        enough = KEEP_ABOVE * going.numel()
        sizes = (size for size in range(group, 0, -1) if size * sum(-(-len(row) // size) for row in left) <= enough)
        size = next(sizes, None)
        if size is None:
            return replace(self, tokens=tokens)
        done = going.tolist().index(False)
        rows, places = [], []
        for row, mine in enumerate(left):
            for start in range(0, len(mine), size):
                rows.append(row)
                places.append((mine[start : start + size] + [done] * size)[:size])
        kept, chosen = (torch.tensor(each, device=tokens.device) for each in (rows, places))
        flat = chosen.flatten()
        return _Decoding(
            alive=self.alive[flat],
            contexts=[cache.select_contexts(kept) for cache in self.contexts],
            own=[cache.select_completions(chosen) for cache in self.own],
            bias=self.bias[kept],
            positions=self.positions[flat],
            tokens=tokens[flat],
        )


def _choose(logits: Tensor, temperature: float, top_p: float, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next tokens (A,) and their log-probabilities (A,)."""
    logprobs = (logits / temperature if draws is not None else logits).log_softmax(-1)
    if draws is None:
        tokens = logprobs.argmax(-1)
    else:
        if top_p < 1.0:
            logprobs = nucleus(logprobs, top_p)
        cumulative = logprobs.exp().double().cumsum(-1)
        # The first token whose cumulative share exceeds the draw: a token of probability zero is never the first.
        tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # only where nothing is a number
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probabilities (A, V) within the smallest set of likeliest tokens whose shares reach ``top_p``; -inf outside.

    Source: nucleus sampling, arXiv 1904.09751; as vLLM's top_p, at the sampling temperature.
    """
    ordered, places = logprobs.sort(dim=-1, descending=True, stable=True)
    shares = ordered.double().exp()
    outside = shares.cumsum(-1) - shares >= top_p  # what stands before a token reaches it already
    return logprobs.masked_fill(outside.scatter(-1, places, outside), float("-inf")).log_softmax(-1)


def _uniform(seeds: Sequence[int], group: int, length: int) -> Tensor:
    """Draws in [0, 1 - 2^-32], (prompts * group, length), a prompt's from its own seed; a longer limit only adds."""
    draws = [
        torch.rand(length, group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(draws).transpose(1, 2).flatten(0, 1).clamp_(max=1.0 - 2.0**-32)

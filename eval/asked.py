"""Checkpoints as the meters ask them: loaded when first needed, prompts in one style, completions of common draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cpt_rft.checkpoint import EncodedPrompt, Policy, encode_prompts, load_policy
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split
from cpt_rft.engines.local.generate import Completion, generate, suppression
from cpt_rft.engines.local.network import Network
from cpt_rft.errors import CheckpointError
from cpt_rft.prompts import user_text
from cpt_rft.seeds import derive_seed
from eval.meters import Asking

#: Called with parts done, parts in all, and what is being measured.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Model:
    """A checkpoint, loaded when it is first needed.

    Attributes:
        directory: A Hugging Face directory.
        sha256: Hash of its files.
        asking: How it is asked.
    """

    directory: Path
    sha256: str
    asking: Asking

    @cached_property
    def policy(self) -> Policy:
        """The loaded model."""
        return load_policy(self.directory, dtype=getattr(torch, self.asking.dtype), device=self.asking.device)

    @cached_property
    def network(self) -> Network:
        """The same weights for packed completions."""
        return Network(self.policy.model)

    @cached_property
    def banned(self) -> Tensor:
        """What rollouts may never write, as logits to add."""
        return suppression(self.policy, self.network.device)

    def prompts(self, rows: Sequence[Example]) -> list[EncodedPrompt]:
        """The rows as prompts in the style that is asked for."""
        texts = [(row.images, user_text(row, self.asking.style, self.asking.preset)) for row in rows]
        return encode_prompts(self.policy, texts, [row.id for row in rows])

    def sample(
        self, prompts: Sequence[EncodedPrompt], rows: Sequence[Example], group: int, purpose: str
    ) -> list[list[Completion]]:
        """Completions at temperature 1; a row's draws depend on its id, the style and the purpose, not on the model."""
        seeds = [derive_seed(purpose, row.id, self.asking.style) for row in rows]
        limit = self.asking.max_new_tokens
        return generate(self.policy, prompts, group=group, max_new_tokens=limit, temperature=1.0, seeds=seeds)


def refuse_strangers(first: Model, second: Model) -> None:
    """Two models are compared token by token, so they must have the same tokens.

    Raises:
        CheckpointError: They have not.
    """
    texts = [(model.directory / "tokenizer.json") for model in (first, second)]
    if texts[0].is_file() and texts[1].is_file() and texts[0].read_bytes() != texts[1].read_bytes():
        raise CheckpointError(
            f"{first.directory} and {second.directory} have different tokenizers, so no divergence is defined.",
            "compare a checkpoint with the base model that it came from",
        )


def first_rows(path: Path, count: int) -> list[Example]:
    """The first rows of a file of the data."""
    return read_split(path)[:count]

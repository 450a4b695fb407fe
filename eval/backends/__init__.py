"""Who writes the answers: this process (``local``), vLLM (``vllm``), or a server (``openai``).

Every back end is asked with the token ids and the resized pictures of the local one, and what it says it saw is held
against them: a row is its `fingerprint`, or the evaluation stops.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image
from transformers import AutoTokenizer

from cpt_rft.checkpoint import IMAGE_PAD, EncodedPrompt, Policy
from cpt_rft.config.contracts import Decoding
from cpt_rft.data.picture import Picture, decode_picture
from cpt_rft.engines.local.generate import Completion
from cpt_rft.errors import UserError
from cpt_rft.vision import VisionSpec

BACKENDS = ("local", "vllm", "openai")


class BackendError(UserError):
    """A back end cannot be started or reached, fails, or saw another prompt than it was asked."""


@dataclass(frozen=True)
class Question:
    """One row as a back end is asked.

    Attributes:
        id: The row.
        text: The user's turn, with ``<image>`` where a picture stands.
        images: Pictures as stored.
        prompt: The same, encoded: what the model must see.
        seed: For sampling; none at temperature 0.
    """

    id: str
    text: str
    images: tuple[Picture, ...]
    prompt: EncodedPrompt
    seed: int | None = None


class Backend(Protocol):
    """Writes answers outside this process's own model."""

    def answer(
        self, reader: Policy, questions: Sequence[Question], decoding: Decoding, max_new_tokens: int
    ) -> list[list[Completion]]:
        """One group of `decoding.samples` completions a question; log-probabilities are not given.

        Raises:
            BackendError: It fails, or saw another prompt.
        """
        ...


def reader(directory: Path, vision: VisionSpec) -> Policy:
    """All of a checkpoint that turns rows into prompts, without its weights: these are with the back end."""
    return Policy(cast(Any, None), AutoTokenizer.from_pretrained(directory, local_files_only=True), vision, directory)


def fingerprint(ids: Sequence[int], grid: Sequence[Sequence[int]]) -> str:
    """What a model sees of a row: sha256 of its token ids and of the patches of its pictures (time, height, width)."""
    return hashlib.sha256(json.dumps([list(ids), [list(one) for one in grid]]).encode()).hexdigest()


def asked(prompt: EncodedPrompt) -> str:
    """The fingerprint of a prompt."""
    return fingerprint(prompt.ids.tolist(), [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist())


def unexpanded(policy: Policy, prompt: EncodedPrompt) -> list[int]:
    """The token ids with one pad a picture, as servers take them; each expands it by the picture's size."""
    pad = policy.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    ids = prompt.ids.tolist()
    return [token for place, token in enumerate(ids) if token != pad or place == 0 or ids[place - 1] != pad]


def resized(vision: VisionSpec, picture: Picture, where: str) -> tuple[bytes, tuple[int, int, int]]:
    """A picture as PNG at the size the model sees, which no processor resizes again, and its grid."""
    image = decode_picture(picture, where).convert("RGB")
    height, width = vision.resized(image.height, image.width)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling(vision.resample))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue(), (1, height // vision.patch_size, width // vision.patch_size)


def check_seen(question: Question, ids: Sequence[int], grids: Sequence[Sequence[int]], who: str) -> None:
    """Refuse an answer to another prompt.

    Raises:
        BackendError: Token ids or grids are not those of the local back end.
    """
    if fingerprint(ids, grids) != asked(question.prompt):
        wanted = question.prompt.ids.tolist()
        place = next(
            (n for n, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted))
        )
        raise BackendError(
            f"Row {question.id}: {who} saw another prompt ({len(ids)} tokens, {len(wanted)} asked; first at {place}).",
            "serve this very checkpoint, with its own tokenizer, chat template and pixel budget",
        )

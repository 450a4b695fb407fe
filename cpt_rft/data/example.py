"""One row, the same for every consumer: training, reward, evaluation, exports."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cpt_rft.errors import DataError

Split = Literal["train", "dev", "test"]
Kind = Literal[
    "choice", "short_text", "number", "latex", "yes_no", "sequence", "vqa", "mmmu_choice", "mmmu_open", "mmlu_pro"
]  # fmt: skip
IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Example:
    """A question about zero or more pictures.

    Attributes:
        id: Stable and unique within the project, for example ``mini_gqa/test/00017``.
        task: Name of the task.
        split: ``train``, ``dev`` or ``test``.
        images: Encoded pictures (PNG or JPEG bytes), in the order of their ``<image>`` tags.
        image_paths: A relative path a picture, the same length as ``images``.
        problem: The question with one ``<image>`` tag a picture, without any prompt-style suffix.
        answer: The one label that training uses and strict scoring requires.
        references: Every accepted answer, ``answer`` among them; lenient scoring accepts any.
        rationale: A text that leads to the answer, or none.
        rationale_source: ``dataset``, ``drawn`` or the checkpoint that wrote it; none without a rationale.
        kind: How answers compare (``cpt_rft.scoring``).
        meta: Anything else, JSON-serialisable; ``options``, the texts of a lettered question, A first, is for scoring.
    """

    id: str
    task: str
    split: Split
    images: tuple[bytes, ...]
    image_paths: tuple[str, ...]
    problem: str
    answer: str
    references: tuple[str, ...]
    kind: Kind
    rationale: str | None = None
    rationale_source: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """The texts of a lettered question, A first; none where the row has no list of them."""
        return tuple(self.meta.get("options", ()))

    def __post_init__(self) -> None:
        if not self.answer.strip():
            raise DataError(f"Row {self.id}: the answer is empty.", "give the row an answer or drop it")
        if self.answer not in self.references:
            raise DataError(f"Row {self.id}: the answer {self.answer!r} is not among its references.", "add it")
        if self.problem.count(IMAGE_TAG) != len(self.images):
            raise DataError(
                f"Row {self.id}: {self.problem.count(IMAGE_TAG)} {IMAGE_TAG} tags for {len(self.images)} pictures.",
                f"write exactly one {IMAGE_TAG} a picture in 'problem'",
            )
        if len(self.image_paths) != len(self.images):
            raise DataError(
                f"Row {self.id}: {len(self.image_paths)} paths for {len(self.images)} pictures.", "pair them"
            )
        if self.kind not in get_args(Kind):
            raise DataError(f"Row {self.id}: unknown kind {self.kind!r}.", f"use one of {', '.join(get_args(Kind))}")
        if self.split not in get_args(Split):
            raise DataError(f"Row {self.id}: unknown split {self.split!r}.", f"use one of {', '.join(get_args(Split))}")

"""How many tokens a prompt has once its pictures are expanded, without decoding a picture or loading a model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.errors import CheckpointError
from cpt_rft.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_SENTINEL = "\u0001problem\u0001"


class PromptCounter:
    """Counts tokens of whole prompts as a checkpoint's chat template and tokenizer make them.

    Picklable: the tokenizer is read where it is used.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.before, self.after = self._frame()

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("checkpoint", "before", "after")}

    def __call__(self, text: str, pictures: Sequence[int]) -> int:
        """Tokens of a prompt.

        Args:
            text: The user turn with one ``<image>`` tag a picture.
            pictures: Vision tokens of each picture.
        """
        rendered = self.before + text.replace(IMAGE_TAG, PICTURE) + self.after
        found = len(self._tokenizer.encode(rendered, add_special_tokens=False).ids)
        return found + sum(pictures) - len(pictures)  # each picture had one pad already

    def tokens(self, text: str) -> int:
        """Tokens of a text without any frame."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))

    def _frame(self) -> tuple[str, str]:
        """What the chat template writes before and after the text of a single user turn."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not (self.checkpoint / "tokenizer.json").is_file():
            raise CheckpointError(f"{self.checkpoint} has no tokenizer.json.", "name a checkpoint directory")
        path = self.checkpoint / "chat_template.jinja"
        stored = read_json(self.checkpoint / "chat_template.json") or read_json(
            self.checkpoint / "tokenizer_config.json"
        )
        template = path.read_text(encoding="utf-8") if path.is_file() else str(stored.get("chat_template") or "")
        turn = {"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}
        try:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            rendered = environment.from_string(template).render(messages=[turn], add_generation_prompt=True)
            before, after = rendered.split(_SENTINEL)
        except (TemplateError, ValueError) as error:
            problem = f"The chat template of {self.checkpoint} does not render a user turn ({error})."
            raise CheckpointError(problem, "copy the chat template of the base model") from error
        return before, after

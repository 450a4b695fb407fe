"""What the rows of a stage must have, looked at before the first step and not when one of them comes up."""

from collections.abc import Sequence

from cpt_rft.checkpoint import Policy, encode_prompts
from cpt_rft.config.methods import MethodConfig
from cpt_rft.data.example import Example
from cpt_rft.errors import DataError
from cpt_rft.prompts import target_text, user_text


def check_rows(policy: Policy, method: MethodConfig, batches: Sequence[Sequence[Example]], preset: str) -> None:
    """Refuse a row that cannot be trained on; nothing is cut to fit.

    Raises:
        DataError: A prompt is longer than the method's limit, or a demonstration is asked for that a row has not.
    """
    rows = list({row.id: row for batch in batches for row in batch}.values())
    if method.kind == "grpo" and method.needs_targets:
        for row in rows:
            target_text(row, method.style)
    limit = method.max_prompt_tokens
    for row in rows if limit is not None else ():
        (prompt,) = encode_prompts(policy, [(row.images, user_text(row, method.style, preset))], [row.id])
        if limit is not None and len(prompt.ids) > limit:
            raise DataError(
                f"Row {row.id}: its prompt has {len(prompt.ids)} tokens, more than max_prompt_tokens = {limit}.",
                "raise the limit, drop the row, or let the base see pictures in fewer pixels",
            )

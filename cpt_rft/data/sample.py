"""The closed form against the real thing: a seeded sample of prompts goes through a checkpoint's own processor."""

from pathlib import Path
from typing import Any

from cpt_rft.data.checks import prompts_of
from cpt_rft.data.example import IMAGE_TAG, Example
from cpt_rft.data.index import read_index
from cpt_rft.data.ledger import Json
from cpt_rft.data.parquet import stream_split
from cpt_rft.data.picture import decode_picture
from cpt_rft.errors import DataError
from cpt_rft.seeds import python_random
from cpt_rft.vision import VisionSpec

_PAD = "<|image_pad|>"


def ask_processor(directory: Path, ledger: Json, model: Path) -> Json:
    """Compare the tokens counted for a row with those of the stock tokenizer, chat template and image processor.

    Args:
        directory: Holds the splits.
        ledger: Of the task; its checks name the share.
        model: A checkpoint.

    Raises:
        DataError: A count differs.
    """
    from transformers import AutoTokenizer

    from cpt_rft.pictures import image_processor

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    checks = ledger["checks"]
    processor = image_processor(VisionSpec.read(model).with_limits(checks["min_pixels"], checks["max_pixels"]))
    counted = {row["id"]: row["tokens"] for row in read_index(directory)}
    asked = 0
    for split in ledger["splits"]:
        for number, row in enumerate(stream_split(directory / split, decode=False)):
            chosen = python_random("processor sample", row.id).random() < checks["processor_sample"]
            if not (chosen or number == 0):
                continue
            asked += 1
            found = _tokens(row, tokenizer, processor)
            if found != counted[row.id]:
                raise DataError(
                    f"{row.id}: {counted[row.id]} tokens by formula, {found} by the processor of {model}.",
                    "this model's prompts cannot be counted by formula: report it with the model's name",
                )
    return {"asked": asked, "equal": asked}


def _tokens(row: Example, tokenizer: Any, processor: Any) -> int:
    """Tokens of the longest prompt of a row, as a trainer would make it."""
    pictures = [decode_picture(data, row.id) for data in row.images]
    grids = processor(images=pictures, return_tensors="np")["image_grid_thw"] if pictures else []
    vision = [int(grid.prod()) // processor.merge_size**2 for grid in grids]
    lengths = []
    for text in prompts_of(row):
        pieces = text.split(IMAGE_TAG)
        content: list[dict[str, str]] = []
        for index, piece in enumerate(pieces):
            content += [{"type": "image"}] if index else []
            content += [{"type": "text", "text": piece}] if piece else []
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        tails = zip([0, *vision], rendered.split(_PAD), strict=True)
        expanded = "".join(_PAD * count + tail for count, tail in tails)
        lengths.append(len(tokenizer(expanded, add_special_tokens=False)["input_ids"]))
    return max(lengths)

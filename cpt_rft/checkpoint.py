"""A checkpoint is a Hugging Face directory: load it strictly, write it whole, turn a prompt into its tensors.

Weights carry the names of the released Qwen2.5-VL files (``visual.*``, ``model.layers.*``, ``lm_head.weight``),
which every version of transformers, vLLM and LLaMA-Factory reads. Nothing here needs torchvision.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from cpt_rft.data.example import IMAGE_TAG
from cpt_rft.data.picture import Picture, decode_picture
from cpt_rft.errors import CheckpointError, DataError
from cpt_rft.pictures import PixelTable, image_processor
from cpt_rft.vision import VisionSpec

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
IMAGE_PAD = "<|image_pad|>"
_REQUIRED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_INDEX = "model.safetensors.index.json"
_FIX = "restore the directory from its source or train it again"


@dataclass
class Policy:
    """A model with all that turns text and pictures into its inputs.

    Attributes:
        model: The stock model.
        tokenizer: With its chat template.
        vision: What the model sees of a picture.
        directory: Where it was loaded from.
    """

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: Any
    vision: VisionSpec
    directory: Path

    @cached_property
    def image_processor(self) -> Any:
        """The stock image processor."""
        return image_processor(self.vision)

    @cached_property
    def pixels(self) -> PixelTable:
        """The image processor as a table, for pictures that need no resizing."""
        return PixelTable(self.image_processor, self.vision)


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the model takes it.

    Attributes:
        ids: (S,) token ids, one ``<|image_pad|>`` a merged picture token.
        pixel_values: (N, 1176) patches of all pictures, or none without pictures.
        image_grid_thw: (images, 3) patches in time, height and width, or none without pictures.
    """

    ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


def load_policy(
    directory: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", vision: VisionSpec | None = None
) -> Policy:
    """Load a checkpoint in evaluation mode.

    Args:
        directory: The checkpoint.
        dtype: Arithmetic of the model.
        device: Where it goes.
        vision: What it is to see of a picture, if not what its own files say.

    Raises:
        CheckpointError: A file is missing or truncated, a weight is missing, unknown, misshapen or not finite, or the
            image processor cuts other patches than the model takes.
    """
    verify_checkpoint(directory)
    vision = vision or VisionSpec.read(directory)
    with _no_progress_bar():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.chat_template:
        raise CheckpointError(f"{directory}: the tokenizer has no chat template.", _FIX)
    tower = model.config.vision_config
    takes = (tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size)
    if (vision.patch_size, vision.merge_size, vision.temporal_patch_size) != takes:
        raise CheckpointError(f"{directory}: the image processor cuts other patches than the model takes.", _FIX)
    return Policy(model.to(device).eval(), tokenizer, vision, directory)


def verify_checkpoint(directory: Path) -> None:
    """Check that every file is there and whole, that the weights are those of the configuration, and finite.

    Raises:
        CheckpointError: The first thing that is wrong, with its file.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such checkpoint directory.", "check the path")
    for name in _REQUIRED:
        _read_json(directory / name)
    VisionSpec.read(directory)
    verify_weights(directory)
    for path in _weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise CheckpointError(f"{path}: weight {name} is not finite.", _FIX)


def verify_weights(directory: Path) -> None:
    """Check from the headers alone that the weight files are whole and are those of the configuration.

    Raises:
        CheckpointError: The first thing that is wrong, with its file.
    """
    _check_names(directory, dict(_stored(directory)), _wanted(directory))


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Released name and shape of every stored weight, from the headers of the files alone.

    Raises:
        CheckpointError: A file is missing or truncated.
    """
    return dict(_stored(directory))


def is_weight_file(path: Path) -> bool:
    """Whether a file of a checkpoint holds weights, or says which file holds which."""
    return path.name == _INDEX or path.suffix in {".safetensors", ".bin", ".pt", ".pth"}


def save_checkpoint(weights: Policy | Mapping[str, Tensor], directory: Path, *, source: Path) -> None:
    """Write ``directory`` whole or not at all: float32 weights, and every other file of ``source`` byte for byte.

    Args:
        weights: A policy, or its state dict (for example float32 master weights), in either form of the names.
        directory: Must not exist yet.
        source: The parent checkpoint, whose configuration, tokenizer, template and processor files are kept.

    Raises:
        CheckpointError: The directory exists, a weight is not finite, or names and shapes are not the parent's.
    """
    state = weights.model.state_dict() if isinstance(weights, Policy) else weights
    named = {released_name(name): weight for name, weight in state.items()}
    shapes = dict(_stored(source))
    if "lm_head.weight" not in shapes:  # tied to the embedding, so the parent keeps it once
        named.pop("lm_head.weight", None)
    _check_names(directory, {name: tuple(weight.shape) for name, weight in named.items()}, shapes)
    with fresh_directory(directory) as partial:
        for path in sorted(source.iterdir()):
            if path.is_file() and not is_weight_file(path):
                shutil.copyfile(path, partial / path.name)
        write_weights(partial / "model.safetensors", named)


def released_name(name: str) -> str:
    """The name of a weight in the released files, from its name in memory (or from itself).

    >>> released_name("model.language_model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> released_name("model.visual.merger.ln_q.weight"), released_name("lm_head.weight")
    ('visual.merger.ln_q.weight', 'lm_head.weight')
    """
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def memory_name(name: str) -> str:
    """The inverse of `released_name`, in every transformers since 4.52.

    >>> memory_name("model.layers.0.mlp.up_proj.weight"), memory_name("visual.merger.ln_q.weight")
    ('model.language_model.layers.0.mlp.up_proj.weight', 'model.visual.merger.ln_q.weight')
    >>> memory_name("model.visual.merger.ln_q.weight"), memory_name("lm_head.weight")
    ('model.visual.merger.ln_q.weight', 'lm_head.weight')
    """
    name = released_name(name)
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as float32 safetensors under the released names.

    Raises:
        CheckpointError: A weight is not finite.
    """
    # Copies: the file format refuses weights that share storage, as slices of one flat buffer do.
    named = {
        released_name(name): weight.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, weight in state.items()
    }
    for name, weight in named.items():
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"Weight {name} is not finite, so nothing was saved.", "lower the learning rate")
    save_file(named, path, metadata={"format": "pt"})


@contextmanager
def fresh_directory(directory: Path) -> Iterator[Path]:
    """A directory beside ``directory`` to fill, which takes its name, synced to disk, once it is complete.

    Raises:
        CheckpointError: The directory exists already or cannot be written.
    """
    if directory.exists():
        raise CheckpointError(f"{directory} exists already.", "remove it or choose another directory")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(directory)
        _sync(directory.parent)
    except (OSError, SafetensorError) as error:
        fix = "free disk space, or choose a directory that can be written"
        raise CheckpointError(f"{directory} could not be written ({error}).", fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def vision_token_ids(policy: Policy) -> list[int]:
    """Every id that sampling must never produce: without its picture the model cannot take it."""
    return sorted(policy.tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS)


def encode_prompt(policy: Policy, images: Sequence[Picture], user_text: str) -> EncodedPrompt:
    """One user turn under the chat template, up to where the assistant begins; see `encode_prompts`."""
    return encode_prompts(policy, [(images, user_text)])[0]


def encode_prompts(
    policy: Policy, prompts: Sequence[tuple[Sequence[Picture], str]], names: Sequence[str] | None = None
) -> list[EncodedPrompt]:
    """Encode (pictures, text) pairs exactly as the stock chat template, tokenizer and image processor do.

    Each ``<image>`` in a text stands for the next of its pictures. ``names`` (row ids) appear in errors.

    Raises:
        DataError: A picture does not decode or is too small, or tags and pictures do not match.
    """
    names = names or [f"Prompt {number}" for number in range(1, len(prompts) + 1)]
    return [_encode(policy, images, text, name) for (images, text), name in zip(prompts, names, strict=True)]


def _encode(policy: Policy, images: Sequence[Picture], text: str, where: str) -> EncodedPrompt:
    pieces = text.split(IMAGE_TAG)
    if len(pieces) != len(images) + 1:
        raise DataError(f"{where}: {len(pieces) - 1} {IMAGE_TAG} tags for {len(images)} pictures.", "pair them")
    for token in VISION_TOKENS:
        if token in text:
            raise DataError(f"{where}: the text holds the reserved token {token}.", "remove it from the text")
    content: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        content += [{"type": "image"}] if index else []
        content += [{"type": "text", "text": piece}] if piece else []
    rendered = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pictures = [decode_picture(data, f"{where}, picture {number}") for number, data in enumerate(images, 1)]
    if not pictures:
        return EncodedPrompt(_ids(policy, rendered))
    patches, grid = policy.pixels(pictures)
    # Expanded as text: the tokenizer maps each pad to its one id, so this equals expanding the ids.
    head, *tails = rendered.split(IMAGE_PAD)
    counts = (grid.prod(-1) // policy.vision.merge_size**2).tolist()
    expanded = head + "".join(IMAGE_PAD * count + tail for count, tail in zip(counts, tails, strict=True))
    return EncodedPrompt(_ids(policy, expanded), patches, grid)


def _ids(policy: Policy, text: str) -> Tensor:
    return torch.tensor(policy.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _wanted(directory: Path) -> dict[str, tuple[int, ...]]:
    """Released name and shape of every weight that the configuration asks for, without making any."""
    path = directory / "config.json"
    if _read_json(path).get("model_type") != "qwen2_5_vl":
        raise CheckpointError(f"{path} is not a Qwen2.5-VL configuration.", "use a Qwen2.5-VL checkpoint")
    try:
        config = Qwen2_5_VLConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            expected = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    except Exception as error:  # transformers raises many kinds; each means that it cannot use the file
        raise CheckpointError(f"{path} does not describe a model ({error}).", _FIX) from error
    wanted = {released_name(name): tuple(weight.shape) for name, weight in expected.items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    return wanted


def _check_names(where: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for problem, names in (("is missing", wanted.keys() - found.keys()), ("is unknown", found.keys() - wanted.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{where}: weight {min(names)} {problem}{more}.", _FIX)
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(f"{where}: weight {name} is {found[name]}, the model needs {shape}.", _FIX)


def _stored(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Released name and shape of every stored weight, from the headers alone."""
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    yield released_name(name), tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}).", _FIX) from error


def _weight_files(directory: Path) -> list[Path]:
    names = ["model.safetensors"]
    if (directory / _INDEX).is_file():
        names = sorted(set(_read_json(directory / _INDEX).get("weight_map", {}).values()))
    for name in names:
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing.", _FIX)
    return [directory / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.", _FIX)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).", _FIX) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", _FIX)
    return content


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The bar of transformers would break ours; a caller who wants it gets it back."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What a model sees of a picture: one frozen specification, from which every consumer's configuration is derived.

A checkpoint states it in ``preprocessor_config.json`` (the old form: ``min_pixels``, ``max_pixels``) or below
``image_processor`` in ``processor_config.json`` (the new form: ``size``). No torch and no transformers here.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cpt_rft.errors import CheckpointError, ConfigError, DataError

MAX_RATIO = 200
OLD_FILE, NEW_FILE = "preprocessor_config.json", "processor_config.json"
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
# Steps that are always on, and steps that Qwen2-VL's processor does not have.
_ON, _OFF = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), ("do_center_crop", "do_pad")
# Each limit in the old and in the new form.
_LIMITS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
_FIX = "copy the image processor files of the base model"


@dataclass(frozen=True)
class VisionSpec:
    """Limits, patches, resampling and normalisation of Qwen2-VL's image processor.

    Attributes:
        min_pixels: Smaller pictures are enlarged to at least this area.
        max_pixels: Larger pictures are shrunk to at most this area.
        patch_size: Pixels of a patch's side.
        merge_size: Patches of a vision token's side.
        temporal_patch_size: Frames of a patch; a picture is repeated to fill them.
        resample: PIL's number of the resampling filter, 3 for bicubic.
        rescale_factor: What the 256 values of a channel are multiplied by.
        image_mean: Subtracted from each channel.
        image_std: Divides each channel.
        processor: Class of the image processor.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    resample: int = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    processor: str = _PROCESSORS[0]

    @classmethod
    def read(cls, checkpoint: Path) -> "VisionSpec":
        """The specification that a checkpoint's files state.

        Raises:
            CheckpointError: No file states it, one is broken, two disagree, or the processor is of another family.
        """
        stated = [(path, _parse(path, raw)) for path, raw in _stated(checkpoint)]
        for path, spec in stated[1:]:
            if spec != stated[0][1]:
                lines = "; ".join(spec_differences(stated[0][1], spec))
                raise CheckpointError(f"{stated[0][0]} and {path.name} disagree: {lines}.", _FIX)
        return stated[0][1]

    def with_limits(self, min_pixels: int | None, max_pixels: int | None) -> "VisionSpec":
        """The same with another pixel budget; none keeps a limit.

        Raises:
            ConfigError: The lower limit is above the upper one.
        """
        spec = replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )
        if spec.min_pixels > spec.max_pixels:
            raise ConfigError(
                f"The pixel budget is empty: min_pixels {spec.min_pixels} is above max_pixels {spec.max_pixels}.",
                "set evaluation.min_pixels and evaluation.max_pixels to a range",
            )
        return spec

    @property
    def factor(self) -> int:
        """Both sides of what the model sees are multiples of this."""
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the processor's resizing.

        Source: transformers image_processing_qwen2_vl.py ``smart_resize``. Sides are rounded to the nearest multiple
        of `factor`, ties to the even one; where the area then leaves the budget, both sides are scaled to its limit
        and rounded inwards. A limit below one token still gives one token a side.

        >>> VisionSpec(min_pixels=3136, max_pixels=12845056).resized(84, 98)
        (84, 112)

        Raises:
            DataError: A side is no positive number, or one is over 200 times the other.
        """
        if min(height, width) < 1:
            raise DataError(f"A picture of {width} x {height} px has no area.", "drop the picture")
        if max(height, width) / min(height, width) > MAX_RATIO:
            raise DataError(
                f"A picture of {width} x {height} px is over {MAX_RATIO} times as long as wide.",
                f"crop it to a ratio of at most {MAX_RATIO}",
            )
        sides = (height, width)
        rows, columns = (round(side / self.factor) for side in sides)
        if rows * columns * self.factor**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / self.factor)) for side in sides)
        elif rows * columns * self.factor**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / self.factor) for side in sides)
        return rows * self.factor, columns * self.factor

    def patches(self, height: int, width: int) -> int:
        """Rows of ``pixel_values`` that a picture gives."""
        rows, columns = self.resized(height, width)
        return rows * columns // self.patch_size**2

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens that a picture takes in a prompt.

        >>> VisionSpec(min_pixels=3136, max_pixels=12845056).image_tokens(84, 84)
        9
        """
        return self.patches(height, width) // self.merge_size**2

    # --- what consumers are told ----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for contracts."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**values, **dict.fromkeys(_ON, True)}

    def processor_kwargs(self) -> dict[str, Any]:
        """Arguments of the image processor's constructor, in the old and the new form at once."""
        values = {key: value for key, value in self.to_json().items() if key != "processor"}
        return {**values, "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}}

    def llamafactory(self) -> dict[str, int]:
        """Keys of LLaMA-Factory's YAML.

        It shrinks or enlarges the picture itself before the checkpoint's processor rounds to multiples of `factor`,
        so the checkpoint's files must state the same budget; within it both agree with `resized`.
        """
        return {"image_max_pixels": self.max_pixels, "image_min_pixels": self.min_pixels}

    def easyr1(self) -> dict[str, int]:
        """Keys of EasyR1's command line; it resizes in two steps as LLaMA-Factory does."""
        return {"data.max_pixels": self.max_pixels, "data.min_pixels": self.min_pixels}

    def vllm(self) -> dict[str, int]:
        """``mm_processor_kwargs`` of vLLM."""
        return {"max_pixels": self.max_pixels, "min_pixels": self.min_pixels}


def spec_differences(one: VisionSpec, other: VisionSpec) -> list[str]:
    """What differs between two specifications, one line a field."""
    return [
        f"{field.name} {getattr(one, field.name)} against {getattr(other, field.name)}"
        for field in fields(VisionSpec)
        if getattr(one, field.name) != getattr(other, field.name)
    ]


def _stated(checkpoint: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The image processor's section of each file that has one."""
    old, new = checkpoint / OLD_FILE, checkpoint / NEW_FILE
    if not old.is_file() and not new.is_file():
        raise CheckpointError(f"{old} is missing or broken (there is no such file).", _FIX)
    if old.is_file():
        yield old, _json(old)
    if new.is_file():
        section = _json(new).get("image_processor")
        if section is not None or not old.is_file():  # older versions write the file without the section
            yield new, section if isinstance(section, Mapping) else {}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or broken ({error}).", _FIX) from error
    return content


def _parse(path: Path, raw: Mapping[str, Any]) -> VisionSpec:
    processor = raw.get("image_processor_type", _PROCESSORS[0])
    if processor not in _PROCESSORS:
        raise CheckpointError(f"{path} names the image processor {processor}.", f"use one of {', '.join(_PROCESSORS)}")
    unusual = [key for key in _ON if not raw.get(key, True)] + [key for key in _OFF if raw.get(key)]
    if unusual:
        raise CheckpointError(f"{path} sets {unusual[0]}: {raw[unusual[0]]}, which Qwen2-VL's does not.", _FIX)
    names = {field.name for field in fields(VisionSpec)} - {"min_pixels", "max_pixels", "processor"}
    values = {key: raw[key] for key in names if raw.get(key) is not None}
    for key in ("image_mean", "image_std"):
        if key in values:
            values[key] = tuple(values[key])
    lowest, highest = (_limit(path, raw, *keys) for keys in _LIMITS)
    return VisionSpec(min_pixels=lowest, max_pixels=highest, processor=processor, **values)


def _limit(path: Path, raw: Mapping[str, Any], old: str, new: str) -> int:
    """One limit of the budget, which the two forms must state alike."""
    size = raw.get("size") or {}
    forms = {old: raw.get(old), f"size.{old}": size.get(old), f"size.{new}": size.get(new)}
    stated = {key: value for key, value in forms.items() if value is not None}
    if not stated:
        raise CheckpointError(f"{path} states no pixel limits.", _FIX)
    if len(set(stated.values())) > 1:
        both = " and ".join(f"{key} {value}" for key, value in stated.items())
        raise CheckpointError(f"{path} states two limits: {both}.", "make them equal: libraries read one or the other")
    value = next(iter(stated.values()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {next(iter(stated))} is {value!r}, no number of pixels.", _FIX)
    return value

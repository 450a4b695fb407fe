"""Pictures turned into patches exactly as the stock image processor does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from cpt_rft.vision import VisionSpec


def image_processor(vision: VisionSpec) -> Any:
    """The stock processor that computes with PIL and numpy, alike on every machine, with or without torchvision."""
    # transformers 5.x has two and calls this one ...Pil; 4.x has only this one, under the plain name.
    pil = "Qwen2VLImageProcessorPil"
    name = pil if hasattr(transformers, pil) else "Qwen2VLImageProcessor"
    return getattr(transformers, name)(**vision.processor_kwargs())


class PixelTable:
    """The stock image processor, with a table for RGB pictures that it would not resize.

    Rescaling and normalising give each of the 256 values of a channel one number, so the stock processor is
    asked once for all of them. The rest is an index and a transpose: the same bits, at a fraction of the time.
    """

    def __init__(self, processor: Any, vision: VisionSpec) -> None:
        self.processor, self.vision = processor, vision
        self.patch, self.merge, self.frames = vision.patch_size, vision.merge_size, vision.temporal_patch_size
        side = self.patch * self.merge * 4
        ramp = (np.arange(side * side) % 256).astype(np.uint8).reshape(side, side)
        flat = self._layout(np.stack([ramp] * 3)).reshape(-1, 3, self.frames * self.patch**2)
        picture = Image.fromarray(np.stack([ramp] * 3, -1))
        # Not resized, however small the budget is: each value must come out as itself.
        values = processor(images=[picture], do_resize=False, return_tensors="np")["pixel_values"].reshape(flat.shape)
        self.table = np.zeros((3, 256), np.float32)
        for channel in range(3):
            self.table[channel, flat[:, channel]] = values[:, channel]

    def __call__(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Patches (N, 1176) and grids (pictures, 3)."""
        parts = [self._fast(picture) if self._as_is(picture) else self._stock([picture]) for picture in pictures]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([patches for patches, _ in parts]), torch.cat([grid for _, grid in parts])

    def _as_is(self, picture: Image.Image) -> bool:
        size = (picture.height, picture.width)
        plain = picture.mode == "RGB" and "transparency" not in picture.info
        return plain and self.vision.resized(*size) == size

    def _fast(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        pixels = np.asarray(picture).transpose(2, 0, 1)
        values = np.stack([self.table[channel][pixels[channel]] for channel in range(3)])
        grid = [1, picture.height // self.patch, picture.width // self.patch]
        return torch.from_numpy(self._layout(values)), torch.tensor([grid])

    def _stock(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        batch = self.processor(images=pictures, return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def _layout(self, pixels: np.ndarray) -> np.ndarray:
        """(3, H, W) to (patches, 3 * frames * patch * patch), patches grouped by the merge window."""
        rows, columns = pixels.shape[1] // self.patch, pixels.shape[2] // self.patch
        merge, patch = self.merge, self.patch
        blocks = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        return np.repeat(blocks, self.frames, axis=5).reshape(rows * columns, -1)

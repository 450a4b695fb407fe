"""What the two frameworks make of a picture; they are of one author and resize in the same way."""

import math

from cpt_rft.data.example import Example
from cpt_rft.data.picture import canonical, encode_png, load_picture, needs_no_change
from cpt_rft.vision import VisionSpec


def seen_pictures(row: Example, spec: VisionSpec) -> tuple[list[bytes], list[int]]:
    """The pictures of a row, upright and in RGB, and the tokens that each will be.

    Raises:
        DataError: One does not decode.
    """
    pictures, tokens = [], []
    for number, data in enumerate(row.images, 1):
        where = f"{row.id}, picture {number}"
        picture = load_picture(data, where)
        pictures.append(data if needs_no_change(picture) else encode_png(canonical(picture, where)))
        tokens.append(spec.image_tokens(*framework_size(spec, picture.height, picture.width)))
    return pictures, tokens


def framework_size(spec: VisionSpec, height: int, width: int) -> tuple[int, int]:
    """Height and width that the frameworks give a picture before the checkpoint's image processor rounds them.

    Source: llamafactory 0.9.5 data/mm_plugin.py ``BasePlugin._preprocess_image``; EasyR1@b44b311
    verl/utils/dataset.py ``process_image``.

    >>> framework_size(VisionSpec(min_pixels=3136, max_pixels=10000), 100, 400)
    (50, 200)
    """
    if height * width > spec.max_pixels:
        factor = math.sqrt(spec.max_pixels / (height * width))
        height, width = int(height * factor), int(width * factor)
    if height * width < spec.min_pixels:
        factor = math.sqrt(spec.min_pixels / (height * width))
        height, width = int(height * factor), int(width * factor)
    return height, width

"""One specification of what a model sees: the stock processor's sizes and pixels, every consumer's configuration."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from cpt_rft.checkpoint import load_policy
from cpt_rft.errors import CheckpointError, ConfigError, DataError
from cpt_rft.pictures import PixelTable, image_processor
from cpt_rft.seeds import python_random
from cpt_rft.vision import VisionSpec
from tests.helpers.engine import make_base

# The released 7B model's limits, the two budgets of the released scripts, and one that small pictures reach.
RELEASED = VisionSpec(min_pixels=3136, max_pixels=12845056)
# Beside the class that is used: its module has another name in each version of transformers.
smart_resize = sys.modules[type(image_processor(RELEASED)).__module__].smart_resize
BUDGETS = (
    RELEASED,
    VisionSpec(min_pixels=262144, max_pixels=4194304),
    VisionSpec(min_pixels=200704, max_pixels=1003520),
    VisionSpec(min_pixels=3136, max_pixels=50176),
)
# (height, width): smallest sides, ties between two multiples of 28, sides about a limit, ratios up to 200.
EDGES = [
    (28, 28), (28, 29), (29, 28), (28, 5600), (5600, 28), (28, 5599), (30, 5999), (29, 5800),
    (42, 42), (70, 70), (98, 98), (126, 154), (42, 70), (14 * 5, 14 * 7), (13 * 14, 15 * 14), (41, 43), (69, 71),
    (56, 56), (55, 56), (55, 57), (57, 57), (56, 55), (112, 28), (28, 111), (28, 112), (27 * 4, 29),
    (3584, 3584), (3583, 3584), (3584, 3585), (3597, 3598), (3598, 3598), (3599, 3599),
    (512, 512), (511, 513), (2048, 2048), (2047, 2049), (1001, 1003), (224, 224), (223, 225), (238, 224), (239, 224),
]  # fmt: skip


def drawn_sizes(count: int, longest: int) -> list[tuple[int, int]]:
    """Sides spread evenly over their logarithm, a tenth of them near the largest ratio."""
    random = python_random("sizes", count, longest)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < count:
        height, width = (round(28 * math.exp(random.random() * math.log(longest / 28))) for _ in range(2))
        if len(sizes) % 10 == 0:
            height, width = sorted(
                (28 + random.randrange(12), 200 * 28 - random.randrange(600)), key=lambda _: random.random()
            )
        if max(height, width) <= 200 * min(height, width):
            sizes.append((height, width))
    return sizes


SIZES = [*EDGES, *drawn_sizes(1000 - len(EDGES), 9000)]


@pytest.mark.parametrize("spec", BUDGETS, ids=lambda spec: f"{spec.min_pixels}-{spec.max_pixels}")
def test_a_thousand_sizes_are_those_of_the_stock_function(spec: VisionSpec) -> None:
    assert len(SIZES) == 1000
    limits = {"factor": 28, "min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    assert [spec.resized(*size) for size in SIZES] == [smart_resize(*size, **limits) for size in SIZES]


def test_a_thousand_pictures_come_out_of_the_stock_processor_in_these_sizes() -> None:
    """Real pictures through the real processor; a small budget keeps it quick, and most pictures are resized."""
    spec = VisionSpec(min_pixels=3136, max_pixels=8 * 28 * 28)
    processor = image_processor(spec)
    sizes = [*[size for size in EDGES if max(size) < 1200], *drawn_sizes(1000, 800)][:1000]
    for height, width in sizes:
        out = processor(images=[Image.new("L", (width, height))], return_tensors="np")
        rows, columns = spec.resized(height, width)
        assert out["image_grid_thw"].tolist() == [[1, rows // 14, columns // 14]]
        assert out["pixel_values"].shape == (spec.patches(height, width), 3 * 2 * 14 * 14)
        assert spec.image_tokens(height, width) == rows * columns // 28**2


def test_the_pixels_are_those_of_a_picture_resized_to_this_size() -> None:
    spec = VisionSpec(min_pixels=3136, max_pixels=16 * 28 * 28)
    processor = image_processor(spec)
    random = np.random.default_rng(0)
    for height, width in [(28, 28), (42, 70), (90, 333), (300, 31), (56, 57), (500, 400), (112, 112)]:
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        rows, columns = spec.resized(height, width)
        resized = picture.resize((columns, rows), Image.Resampling(spec.resample))
        one, other = (processor(images=[each], return_tensors="np")["pixel_values"] for each in (picture, resized))
        assert np.array_equal(one, other)
        patches, grid = PixelTable(processor, spec)([picture])
        assert np.array_equal(patches.numpy(), one) and grid.tolist() == [[1, rows // 14, columns // 14]]


@pytest.mark.parametrize("size", [(28, 5601), (5601, 28), (1, 201), (40, 9000)])
def test_a_picture_over_200_times_as_long_as_wide_is_refused_as_the_stock_processor_refuses_it(size) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(*size)
    with pytest.raises(DataError, match=rf"{size[1]} x {size[0]} px is over 200 times .* Fix: crop it to a ratio"):
        RELEASED.resized(*size)
    assert RELEASED.resized(28, 5600) == (28, 5600)


def test_a_picture_without_area_is_refused() -> None:
    with pytest.raises(DataError, match="no area"):
        RELEASED.resized(0, 28)


@given(st.integers(28, 4000), st.integers(28, 4000), st.integers(1, 40), st.integers(0, 400))
def test_what_any_size_becomes(height: int, width: int, least: int, more: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    spec = VisionSpec(min_pixels=least * 784, max_pixels=(least + more) * 784)
    rows, columns = spec.resized(height, width)
    assert rows % 28 == columns % 28 == 0 and min(rows, columns) >= 28
    assert (rows, columns) == smart_resize(height, width, 28, spec.min_pixels, spec.max_pixels)
    assert spec.image_tokens(height, width) == spec.image_tokens(width, height)


# --- files ------------------------------------------------------------------------------------------------------------


def write(directory: Path, old: dict | None = None, new: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    if old is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(old))
    if new is not None:
        (directory / "processor_config.json").write_text(json.dumps(new))
    return directory


OLD = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
SIZE = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OLD, None),
        ({**OLD, "image_processor_type": "Qwen2VLImageProcessor", "rescale_factor": 0.00392156862745098}, None),
        (SIZE, None),
        ({"size": {"min_pixels": 3136, "max_pixels": 12845056}}, None),
        ({**OLD, **SIZE}, {"image_processor": SIZE}),
        (None, {"image_processor": {**OLD, **SIZE}}),
        (OLD, {"processor_class": "Qwen2_5_VLProcessor"}),
    ],
)
def test_the_old_and_the_new_form_say_the_same(tmp_path: Path, old, new) -> None:
    assert VisionSpec.read(write(tmp_path, old, new)) == RELEASED


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (None, None, r"preprocessor_config\.json is missing"),
        (None, {}, "states no pixel limits"),
        ({"min_pixels": 3136}, None, "states no pixel limits"),
        ({**OLD, "size": {"longest_edge": 784}}, None, r"two limits: max_pixels 12845056 and size\.longest_edge 784"),
        (OLD, {"image_processor": {**OLD, "max_pixels": 50176}}, "disagree: max_pixels 12845056 against 50176"),
        ({**OLD, "min_pixels": "many"}, None, "no number of pixels"),
        ({**OLD, "image_processor_type": "CLIPImageProcessor"}, None, "names the image processor CLIPImageProcessor"),
        ({**OLD, "do_resize": False}, None, "sets do_resize: False"),
        ({**OLD, "do_center_crop": True}, None, "sets do_center_crop: True"),
    ],
)  # fmt: skip
def test_files_that_do_not_say_it_clearly_are_refused(tmp_path: Path, old, new, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VisionSpec.read(write(tmp_path, old, new))


# --- consumers --------------------------------------------------------------------------------------------------------


def test_every_consumer_is_told_the_same_budget() -> None:
    spec = RELEASED.with_limits(262144, 4194304)
    assert spec.llamafactory() == {"image_min_pixels": 262144, "image_max_pixels": 4194304}
    assert spec.easyr1() == {"data.min_pixels": 262144, "data.max_pixels": 4194304}
    assert spec.vllm() == {"min_pixels": 262144, "max_pixels": 4194304}
    processor = image_processor(spec)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (262144, 4194304)
    stated = spec.to_json()
    assert {**stated, "processor": None} == {**RELEASED.to_json(), **spec.vllm(), "processor": None}
    assert json.loads(json.dumps(stated)) == stated


def test_each_field_reaches_the_processor() -> None:
    changed = VisionSpec(
        min_pixels=784,
        max_pixels=7840,
        patch_size=16,
        merge_size=1,
        temporal_patch_size=3,
        resample=2,
        rescale_factor=0.5,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
    )
    processor = image_processor(changed)
    for name in ("patch_size", "merge_size", "temporal_patch_size", "resample", "rescale_factor"):
        assert getattr(processor, name) == getattr(changed, name), name
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_limits_may_be_changed_one_by_one_but_not_crossed() -> None:
    assert RELEASED.with_limits(None, None) == RELEASED
    assert RELEASED.with_limits(None, 50176) == VisionSpec(min_pixels=3136, max_pixels=50176)
    with pytest.raises(ConfigError, match="min_pixels 3136 is above max_pixels 784"):
        RELEASED.with_limits(None, 784)


def test_a_policy_sees_what_it_is_told_to_see(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    picture = Image.new("RGB", (84, 84))
    assert load_policy(base).pixels([picture])[1].tolist() == [[1, 6, 6]]
    smaller = VisionSpec.read(base).with_limits(784, 56 * 56)
    assert load_policy(base, vision=smaller).pixels([picture])[1].tolist() == [[1, 4, 4]]
    for name in ("preprocessor_config.json", "processor_config.json"):
        (base / name).write_text((base / name).read_text().replace('"merge_size": 2', '"merge_size": 1'))
    with pytest.raises(CheckpointError, match="cuts other patches than the model takes"):
        load_policy(base)

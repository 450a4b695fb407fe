"""Checkpoints: loaded strictly, written whole, and prompts encoded as the stock classes do."""

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from cpt_rft.checkpoint import (
    Policy,
    encode_prompt,
    encode_prompts,
    load_policy,
    save_checkpoint,
    verify_checkpoint,
    vision_token_ids,
    write_weights,
)
from cpt_rft.errors import CheckpointError, DataError
from cpt_rft.miniature.model import ADDED_TOKENS, Sizes, added_token_id, build_model, train_tokenizer, write_base

TINY = Sizes(
    hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, vision_hidden=16, vision_depth=2, vision_heads=2, vision_mlp=16
)
VOCAB_SIZE = 256 + 12 + len(ADDED_TOKENS)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    write_base(
        directory, build_model(VOCAB_SIZE, 0, TINY), train_tokenizer(["You are a helpful assistant."], VOCAB_SIZE)
    )
    return directory


@pytest.fixture(scope="module")
def policy(base: Path) -> Policy:
    return load_policy(base)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def encoded(width: int, height: int, mode: str = "RGB", kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, kind)
    return file.getvalue()


def stock(policy: Policy, images: list[bytes], text: str) -> tuple[list[int], torch.Tensor | None, torch.Tensor | None]:
    """The stock way: template, processor, one pad for each merged token put in by id."""
    content: list[dict[str, str]] = []
    for index, piece in enumerate(text.split("<image>")):
        content += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": piece}] * bool(piece)
    chat = [{"role": "user", "content": content}]
    rendered = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = policy.tokenizer(rendered).input_ids
    if not images:
        return ids, None, None
    out = policy.image_processor([Image.open(BytesIO(image)) for image in images], return_tensors="pt")
    pad = policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = iter((out["image_grid_thw"].prod(-1) // 4).tolist())
    expanded = [one for token in ids for one in ([pad] * next(counts) if token == pad else [token])]
    return expanded, out["pixel_values"], out["image_grid_thw"]


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([], "No picture, é 日本 <think>"),
        ([encoded(84, 84)], "<image>What colour? Answer now."),
        ([encoded(84, 112, seed=1), encoded(56, 56, seed=2)], " between <image> and\n\n<image> end"),
        ([encoded(28, 28), encoded(100, 61), encoded(28, 300)], "<image><image><image>resized"),
        ([encoded(84, 84, "L"), encoded(84, 84, "RGBA"), encoded(84, 84, "P")], "<image>modes<image><image>"),
        ([encoded(84, 84, kind="JPEG")], "<image>"),
    ],
)
def test_encoding_equals_the_stock_path(policy: Policy, images: list[bytes], text: str) -> None:
    ids, pixels, grid = stock(policy, images, text)
    prompt = encode_prompt(policy, images, text)
    assert prompt.ids.tolist() == ids
    if pixels is None or grid is None:
        assert prompt.pixel_values is None
        assert prompt.image_grid_thw is None
    else:
        assert prompt.pixel_values is not None and torch.equal(prompt.pixel_values, pixels)
        assert prompt.image_grid_thw is not None and torch.equal(prompt.image_grid_thw, grid)
        assert prompt.pixel_values.dtype == torch.float32


def test_a_small_picture_is_nine_tokens(policy: Policy) -> None:
    prompt = encode_prompt(policy, [encoded(84, 84)], "<image>")
    assert (prompt.ids == added_token_id("<|image_pad|>", VOCAB_SIZE)).sum() == 9
    assert prompt.pixel_values is not None and prompt.pixel_values.shape == (36, 1176)


def test_batch_equals_one_by_one_and_decoded_pictures(policy: Policy) -> None:
    data = encoded(84, 84)
    pair = encode_prompts(policy, [([data], "<image>a"), ([Image.open(BytesIO(data))], "<image>b")])
    assert pair[0].ids.tolist() == encode_prompt(policy, [data], "<image>a").ids.tolist()
    assert pair[0].pixel_values is not None and pair[1].pixel_values is not None
    assert torch.equal(pair[0].pixel_values, pair[1].pixel_values)


@pytest.mark.parametrize(
    ("images", "text", "problem"),
    [
        ([encoded(84, 84), b"not a picture"], "<image><image>", "row 7, picture 2 does not decode"),
        ([encoded(84, 84)[:2000]], "<image>", "row 7, picture 1 does not decode"),
        ([b""], "<image>", "row 7, picture 1 does not decode"),
        ([encoded(27, 84)], "<image>", "row 7, picture 1 is 27 x 84 px"),
        ([encoded(28 * 201, 28)], "<image>", "row 7, picture 1 is 5628 x 28 px"),
        ([encoded(84, 84)], "none", "row 7: 0 <image> tags for 1 pictures"),
        ([], "<image>", "row 7: 1 <image> tags for 0 pictures"),
        ([], "a <|image_pad|>", "row 7: the text holds the reserved token <|image_pad|>"),
    ],
    ids=["text", "truncated", "empty", "small", "narrow", "no tag", "no picture", "reserved"],
)
def test_bad_prompt(policy: Policy, images: list[bytes], text: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_prompts(policy, [([], "fine"), (images, text)], names=["row 6", "row 7"])
    assert caught.value.problem.startswith(problem)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_vision_tokens_are_complete(policy: Policy) -> None:
    config = policy.model.config
    named = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    ids = vision_token_ids(policy)
    assert named < set(ids)
    assert set(ids) == {added_token_id(token, VOCAB_SIZE) for token in ADDED_TOKENS if re_vision(token)}


def re_vision(token: str) -> bool:
    return any(part in token for part in ("vision", "image_pad", "video_pad"))


def test_round_trip_is_bit_equal_and_companions_are_copied(policy: Policy, base: Path, tmp_path: Path) -> None:
    (extra := tmp_path / "source").mkdir()
    shutil.copytree(base, extra, dirs_exist_ok=True)
    (extra / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfodd bytes\r\n")
    (extra / "recipe.json").write_text("{}")
    (extra / "optimizer.pt").write_bytes(b"not to be copied")
    save_checkpoint(policy, tmp_path / "saved", source=extra)
    for path in extra.iterdir():
        if path.name == "optimizer.pt":
            assert not (tmp_path / "saved" / path.name).exists()
        else:
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name
    loaded = load_policy(tmp_path / "saved")
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert not loaded.model.training
    assert not (tmp_path / "saved.partial").exists()


def test_names_are_those_of_the_release(base: Path) -> None:
    names = load_file(base / WEIGHTS)
    assert {name.split(".")[0] for name in names} == {"visual", "model", "lm_head"}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "visual.patch_embed.proj.weight" in names


def test_stock_class_loads_what_was_saved(policy: Policy, base: Path) -> None:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_bfloat16_policy_is_saved_as_float32(base: Path, tmp_path: Path) -> None:
    half = load_policy(base, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    save_checkpoint(half, tmp_path / "saved", source=base)
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    assert torch.equal(saved["lm_head.weight"], half.model.lm_head.weight.detach().float())


def test_slices_of_one_buffer_can_be_saved(policy: Policy, base: Path, tmp_path: Path) -> None:
    state = policy.model.state_dict()
    buffer = torch.cat([weight.flatten() for weight in state.values()])
    parts = buffer.split([weight.numel() for weight in state.values()])
    flat = {name: part.view(weight.shape) for (name, weight), part in zip(state.items(), parts, strict=True)}
    save_checkpoint(flat, tmp_path / "saved", source=base)
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_never_saved(policy: Policy, base: Path, tmp_path: Path, value: float) -> None:
    state = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    state["lm_head.weight"][3, 5] = value
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not finite"):
        save_checkpoint(state, tmp_path / "saved", source=base)
    with pytest.raises(CheckpointError, match="not finite"):
        write_weights(tmp_path / WEIGHTS, state)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_other_names_shapes_and_targets(policy: Policy, base: Path, tmp_path: Path) -> None:
    state = policy.model.state_dict()
    less = {name: weight for name, weight in state.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing"):
        save_checkpoint(less, tmp_path / "saved", source=base)
    with pytest.raises(CheckpointError, match="extra is unknown"):
        save_checkpoint(state | {"extra": torch.zeros(1)}, tmp_path / "saved", source=base)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \(2, 2\)"):
        save_checkpoint(state | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "saved", source=base)
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(policy, base, source=base)
    with pytest.raises(CheckpointError, match="is missing"):
        save_checkpoint(policy, tmp_path / "saved", source=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may pass 20 kB: writing fails in the middle, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_nothing(policy: Policy, base: Path, tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        save_checkpoint(policy, tmp_path / "saved", source=base)
    assert "free disk space" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_left_over_of_a_killed_save_is_replaced(policy: Policy, base: Path, tmp_path: Path) -> None:
    (tmp_path / "saved.partial").mkdir()
    (tmp_path / "saved.partial" / "junk").write_text("half")
    save_checkpoint(policy, tmp_path / "saved", source=base)
    assert not (tmp_path / "saved" / "junk").exists()
    verify_checkpoint(tmp_path / "saved")


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS)


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def set_key(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "there is no such checkpoint directory"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "model.safetensors is missing"),
    "truncated weights": (lambda d: truncate(d / WEIGHTS, 0.6), "model.safetensors is truncated"),
    "truncated header": (lambda d: truncate(d / WEIGHTS, 0.001), "model.safetensors is truncated"),
    "empty weights": (lambda d: truncate(d / WEIGHTS, 0), "model.safetensors is truncated"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "truncated config": (lambda d: truncate(d / "config.json", 0.5), "config.json is not valid JSON"),
    "list config": (lambda d: (d / "config.json").write_text("[]"), "does not hold a JSON object"),
    "other model": (lambda d: set_key(d / "config.json", "model_type", "llama"), "not a Qwen2.5-VL"),
    "bad config": (lambda d: set_key(d / "config.json", "hidden_size", "wide"), "does not describe a model"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "truncated tokenizer": (lambda d: truncate(d / "tokenizer.json", 0.5), "tokenizer.json is not valid JSON"),
    "missing weight": (lambda d: edit_weights(d, lambda s: s.pop("model.norm.weight")), "model.norm.weight is missing"),
    "renamed weight": (
        lambda d: edit_weights(d, lambda s: s.update({"model.norms.weight": s.pop("model.norm.weight")})),
        "model.norm.weight is missing",
    ),
    "unknown weight": (lambda d: edit_weights(d, lambda s: s.update(more=torch.zeros(1))), "weight more is unknown"),
    "misshapen weight": (
        lambda d: edit_weights(d, lambda s: s.update({"model.norm.weight": torch.ones(31)})),
        "model.norm.weight is (31,), the model needs (32,)",
    ),
    "non-finite weight": (
        lambda d: edit_weights(d, lambda s: s["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight is not finite",
    ),
    "missing shard": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "a.safetensors"}}'
        ),
        "a.safetensors is missing",
    ),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "is missing (and"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_checkpoint(copy: Path, name: str) -> None:
    damage, problem = BREAKS[name]
    damage(copy)
    for read in (load_policy, verify_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            read(copy)
        assert problem in caught.value.problem
        assert str(copy) in caught.value.problem
        assert caught.value.fix


def test_no_image_processor_and_no_template(copy: Path, base: Path) -> None:
    for path in (copy / "chat_template.jinja", copy / "chat_template.json"):
        path.unlink()
    set_key(copy / "tokenizer_config.json", "chat_template", None)
    with pytest.raises(CheckpointError, match="no chat template"):
        load_policy(copy)
    for path in copy.glob("*processor_config.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is missing"):
        load_policy(copy)


def test_sharded_weights_load(copy: Path, policy: Policy, tmp_path: Path) -> None:
    state = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    where = {name: "a.safetensors" if "visual" in name else "b.safetensors" for name in state}
    for name, weight in state.items():
        shards[where[name]][name] = weight
    for shard, part in shards.items():
        save_file(part, copy / shard, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    sharded = load_policy(copy)
    assert all(torch.equal(w, policy.model.state_dict()[n]) for n, w in sharded.model.state_dict().items())
    save_checkpoint(sharded, tmp_path / "whole", source=copy)
    assert sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors*")) == [WEIGHTS]


def test_loading_prints_nothing_and_restores_the_bar(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    load_policy(base)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_tied_embeddings_are_kept_once(copy: Path, tmp_path: Path) -> None:
    set_key(copy / "config.json", "tie_word_embeddings", True)
    edit_weights(copy, lambda state: state.pop("lm_head.weight"))
    tied = load_policy(copy)
    assert tied.model.lm_head.weight.data_ptr() == tied.model.get_input_embeddings().weight.data_ptr()
    save_checkpoint(tied, tmp_path / "saved", source=copy)
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / WEIGHTS)
    load_policy(tmp_path / "saved")

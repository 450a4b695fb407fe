"""The tiny Qwen2.5-VL: tokenizer, weights and the files of its directory."""

import hashlib
import json
from pathlib import Path

import pytest
import regex
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig
from transformers.models.qwen2 import tokenization_qwen2

from cpt_rft.errors import CheckpointError
from cpt_rft.miniature.model import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    QWEN_SPLIT,
    Sizes,
    added_token_id,
    build_model,
    train_tokenizer,
    write_base,
)

TINY = Sizes(
    hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, vision_hidden=16, vision_depth=2, vision_heads=2, vision_mlp=16
)
FRAME = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_start|>assistant\n"
CORPUS = [FRAME, FRAME, "What colour is the circle? Answer now.", "a red circle, a blue square; 12 of 345"] * 40
VOCAB_SIZE = 256 + 64 + len(ADDED_TOKENS)
TRICKY = (
    "I'll  go\n\n12 é",
    "don't WE'VE it's",
    "  leading and trailing  ",
    "tabs\t\tand\r\nlines\r\n\r\n x",
    "\\boxed{12.5}<think>a</think>",
    "日本語テスト 123456 ½²",
    "e\u0301 composed, \u00e9 precomposed, \u2126",
    "🙂🙃 emoji\u200d joiner",
    "a_b-c/d  (x,y)...!!!\n",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, VOCAB_SIZE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    write_base(directory, build_model(VOCAB_SIZE, 0, TINY), tokenizer)
    return directory


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def test_tokenizer_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(CORPUS, VOCAB_SIZE).to_str() == tokenizer.to_str()


def test_split_is_that_of_qwen2() -> None:
    assert tokenization_qwen2.PRETOKENIZE_REGEX == QWEN_SPLIT


def byte_letters(text: str) -> str:
    """GPT-2's printable letter for every UTF-8 byte, written out here from its definition."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = dict(zip(plain + others, plain + list(range(256, 256 + len(others))), strict=True))
    return "".join(chr(letters[byte]) for byte in text.encode())


@pytest.mark.parametrize("text", TRICKY)
def test_pre_tokenizer_cuts_as_the_regex_does(tokenizer: Tokenizer, text: str) -> None:
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == [byte_letters(piece) for piece in regex.findall(QWEN_SPLIT, text)]


def test_known_cut(tokenizer: Tokenizer) -> None:
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("I'll  go\n\n12")]
    assert pieces == ["I", "'ll", "Ġ", "Ġgo", "ĊĊ", "1", "2"]


@pytest.mark.parametrize("text", TRICKY)
def test_stock_tokenizer_gives_the_same_ids(base: Path, tokenizer: Tokenizer, text: str) -> None:
    stock = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.encode(text).ids
    assert stock(text).input_ids == ids
    assert stock.decode(ids) == tokenizer.normalizer.normalize_str(text)


def test_stock_tokenizer_from_vocab_and_merges_gives_the_same_ids(base: Path, tokenizer: Tokenizer) -> None:
    rebuilt = Tokenizer.from_str(tokenizer.to_str())
    rebuilt.model = type(tokenizer.model).from_file(str(base / "vocab.json"), str(base / "merges.txt"))
    assert all(rebuilt.encode(text).ids == tokenizer.encode(text).ids for text in TRICKY)


def test_added_tokens_have_the_last_ids_and_are_never_cut(base: Path) -> None:
    stock = AutoTokenizer.from_pretrained(base)
    assert len(stock) == VOCAB_SIZE
    for token in ADDED_TOKENS:
        assert stock(f"x{token}y").input_ids[1] == added_token_id(token, VOCAB_SIZE)
    assert stock.decode([added_token_id(token, VOCAB_SIZE) for token in CONTROL_TOKENS], skip_special_tokens=True) == ""
    assert (stock.eos_token, stock.pad_token, stock.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_frequent_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    for word in ("system", "user", "assistant", "You", " are", " a", " helpful", " assistant", "\n"):
        assert len(tokenizer.encode(word).ids) == 1, word


def test_corpus_too_small() -> None:
    with pytest.raises(ValueError, match="the corpus gives"):
        train_tokenizer(["abc"], VOCAB_SIZE)


PICTURE, VIDEO = {"type": "image"}, {"type": "video"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [{"role": "user", "content": "Hi"}],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        ),
        (
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": [PICTURE, {"type": "text", "text": "Q?"}]},
            ],
            "<|im_start|>system\nS<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q?<|im_end|>\n",
        ),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": " a\n"}, PICTURE, VIDEO, PICTURE]},
                {"role": "assistant", "content": "b"},
            ],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n a\n<|vision_start|><|image_pad|><|vision_end|>"
            "<|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        ),
    ],
)
def test_chat_template(base: Path, messages: list[dict[str, object]], expected: str) -> None:
    stock = AutoTokenizer.from_pretrained(base)
    assert stock.apply_chat_template(messages, tokenize=False) == expected
    with_prompt = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert with_prompt == expected + "<|im_start|>assistant\n"


def test_chat_template_counts_on_request(base: Path) -> None:
    stock = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": [PICTURE, PICTURE, VIDEO]}]
    text = stock.apply_chat_template(messages, tokenize=False, add_vision_id=True)
    assert "Picture 1: <|vision_start|>" in text
    assert "Picture 2: <|vision_start|>" in text
    assert "Video 1: <|vision_start|><|video_pad|>" in text


def test_template_is_the_same_in_its_three_places(base: Path) -> None:
    assert (base / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert json.loads((base / "chat_template.json").read_text())["chat_template"] == CHAT_TEMPLATE
    assert json.loads((base / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_build_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = weights_hash(build_model(VOCAB_SIZE, 0, TINY))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert weights_hash(build_model(VOCAB_SIZE, 0, TINY)) == first
    assert weights_hash(build_model(VOCAB_SIZE, 1, TINY)) != first


def test_default_size_is_a_little_over_a_million_weights() -> None:
    model = build_model(704, 0)
    count = sum(weight.numel() for weight in model.parameters())
    assert 1_000_000 < count < 1_400_000
    assert not model.training
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_config_reads_back_as_it_was_built(base: Path) -> None:
    config = Qwen2_5_VLConfig.from_pretrained(base)
    built = build_model(VOCAB_SIZE, 0, TINY).config
    assert config.text_config.rope_parameters == built.text_config.rope_parameters
    assert config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert config.vision_config.to_dict() == built.vision_config.to_dict()
    assert config.image_token_id == added_token_id("<|image_pad|>", VOCAB_SIZE)
    assert config.video_token_id == added_token_id("<|video_pad|>", VOCAB_SIZE)
    assert config.vision_start_token_id == added_token_id("<|vision_start|>", VOCAB_SIZE)
    ends = [added_token_id("<|im_end|>", VOCAB_SIZE), added_token_id("<|endoftext|>", VOCAB_SIZE)]
    assert GenerationConfig.from_pretrained(base).eos_token_id == ends


def test_processor_files_in_old_and_new_form(base: Path) -> None:
    old = json.loads((base / "preprocessor_config.json").read_text())
    new = json.loads((base / "processor_config.json").read_text())
    assert old["image_processor_type"] == "Qwen2VLImageProcessor"
    assert (old["min_pixels"], old["max_pixels"]) == (3136, 12845056)
    assert new["image_processor"] == old
    assert new["video_processor"] == json.loads((base / "video_preprocessor_config.json").read_text())


def test_two_writes_give_the_same_bytes(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_base(tmp_path / "again", build_model(VOCAB_SIZE, 0, TINY), tokenizer)
    names = sorted(path.name for path in base.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((tmp_path / "again" / name).read_bytes() == (base / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("vocab_size", "error"), [(VOCAB_SIZE + 1, ValueError), (VOCAB_SIZE, CheckpointError)], ids=["vocabulary", "exists"]
)
def test_write_base_refuses(base: Path, tokenizer: Tokenizer, vocab_size: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        write_base(base, build_model(vocab_size, 0, TINY), tokenizer)

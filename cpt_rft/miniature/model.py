"""The tiny, real Qwen2.5-VL: its tokenizer, its weights at the start, and the directory it is kept in.

Every file has the form of the released Qwen2.5-VL checkpoints, so that stock transformers (4.56 to 5.x), vLLM
and LLaMA-Factory load the directory with nothing of ours imported (``scripts/check_base.sh``).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from cpt_rft.checkpoint import fresh_directory, write_weights

# Source: tokenizer.json of Qwen/Qwen2.5-VL-7B-Instruct, the same string as transformers' PRETOKENIZE_REGEX of Qwen2.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Source: added_tokens of Qwen/Qwen2.5-VL-7B-Instruct, in the order of their ids, after the whole BPE vocabulary.
CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
PLAIN_ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
ADDED_TOKENS = CONTROL_TOKENS + PLAIN_ADDED_TOKENS
DEFAULT_VOCAB_SIZE = 704

# Behaves as the template of Qwen2.5-VL-Instruct: the default system turn, one vision span a picture or video.
CHAT_TEMPLATE = """\
{%- macro numbered(kind, number) %}{% if add_vision_id %}{{ kind ~ ' ' ~ number ~ ': ' }}{% endif %}{% endmacro -%}
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.images = seen.images + 1 -%}
{{- numbered('Picture', seen.images) ~ '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{{- numbered('Video', seen.videos) ~ '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Sizes:
    """What may shrink in a test; everything else follows Qwen2.5-VL. Head width is ``hidden / heads``."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    vision_hidden: int = 64
    vision_depth: int = 2
    vision_heads: int = 2
    vision_mlp: int = 192


def train_tokenizer(corpus: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE with Qwen2's splitting and Qwen2.5-VL's added tokens, the same for the same corpus.

    Args:
        corpus: Texts, each as often as it should count. Whole words become single tokens in order of frequency.
        vocab_size: Tokens in all: 256 bytes, the merges, and the added tokens with the highest ids.

    Raises:
        ValueError: The corpus is too small for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The added tokens are never cut, so their letters must not earn merges.
    between = re.compile("|".join(map(re.escape, ADDED_TOKENS)))
    tokenizer.train_from_iterator((part for text in corpus for part in between.split(text)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def added_token_id(token: str, vocab_size: int) -> int:
    """The id of an added token in a vocabulary of this size."""
    return vocab_size - len(ADDED_TOKENS) + ADDED_TOKENS.index(token)


def build_model(vocab_size: int, seed: int, sizes: Sizes = Sizes()) -> Qwen2_5_VLForConditionalGeneration:
    """A float32 model in evaluation mode whose weights depend on the arguments alone.

    Matrices are normal with the configured ``initializer_range``, norms one, biases zero, as in transformers,
    but drawn in the order of their names from a private generator. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_config(vocab_size, sizes))).float().eval()
    generator = torch.Generator().manual_seed(seed)
    std = model.config.text_config.initializer_range
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(0.0, std, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def write_base(directory: Path, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Write the whole checkpoint, complete or not at all.

    Raises:
        CheckpointError: The directory exists already or a weight is not finite.
        ValueError: Model and tokenizer have different vocabularies.
    """
    vocab_size = model.config.text_config.vocab_size
    if vocab_size != tokenizer.get_vocab_size():
        raise ValueError(f"the model has {vocab_size} tokens, the tokenizer {tokenizer.get_vocab_size()}")
    with fresh_directory(directory) as partial:
        write_weights(partial / "model.safetensors", model.state_dict())
        _write_json(partial / "config.json", _config(vocab_size, _sizes_of(model)))
        _write_json(partial / "generation_config.json", _generation_config(vocab_size))
        _write_tokenizer(partial, tokenizer)
        image, video = _image_processor(), _video_processor()
        _write_json(partial / "preprocessor_config.json", image)
        _write_json(partial / "video_preprocessor_config.json", video)
        _write_json(
            partial / "processor_config.json",
            {"image_processor": image, "processor_class": "Qwen2_5_VLProcessor", "video_processor": video},
        )


def _config(vocab_size: int, sizes: Sizes) -> dict[str, Any]:
    """The flat form of the released config.json; transformers 5.x turns rope_scaling into rope_parameters itself."""
    quarter = sizes.hidden // sizes.heads // 8
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": added_token_id("<|endoftext|>", vocab_size),
        "eos_token_id": added_token_id("<|im_end|>", vocab_size),
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "image_token_id": added_token_id("<|image_pad|>", vocab_size),
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": 4096,
        "max_window_layers": sizes.layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-06,
        # Time, height and width share the head's rotation pairs 2 : 3 : 3, as in the released models.
        "rope_scaling": {"mrope_section": [quarter, quarter * 3 // 2, quarter * 3 // 2], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": added_token_id("<|video_pad|>", vocab_size),
        "vision_config": {
            "depth": sizes.vision_depth,
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "hidden_act": "silu",
            "hidden_size": sizes.vision_hidden,
            "in_channels": 3,
            "in_chans": 3,
            "intermediate_size": sizes.vision_mlp,
            "model_type": "qwen2_5_vl",
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "vision_end_token_id": added_token_id("<|vision_end|>", vocab_size),
        "vision_start_token_id": added_token_id("<|vision_start|>", vocab_size),
        "vision_token_id": added_token_id("<|vision_pad|>", vocab_size),
        "vocab_size": vocab_size,
    }


def _sizes_of(model: Qwen2_5_VLForConditionalGeneration) -> Sizes:
    text, vision = model.config.text_config, model.config.vision_config
    return Sizes(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        mlp=text.intermediate_size,
        vision_hidden=vision.hidden_size,
        vision_depth=vision.depth,
        vision_heads=vision.num_heads,
        vision_mlp=vision.intermediate_size,
    )


def _generation_config(vocab_size: int) -> dict[str, Any]:
    end, text_end = added_token_id("<|im_end|>", vocab_size), added_token_id("<|endoftext|>", vocab_size)
    return {"bos_token_id": text_end, "do_sample": False, "eos_token_id": [end, text_end], "pad_token_id": text_end}


def _image_processor() -> dict[str, Any]:
    """The old form (min_pixels) and the new one (size) at once; both mean the same budget."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "processor_class": "Qwen2_5_VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 12845056, "shortest_edge": 3136},
        "temporal_patch_size": 2,
    }


def _video_processor() -> dict[str, Any]:
    video = _image_processor() | {"video_processor_type": "Qwen2VLVideoProcessor"}
    return {key: value for key, value in video.items() if key != "image_processor_type"}


def _write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, its older parts vocab.json and merges.txt, and the template in its three known places."""
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(CONTROL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2_5_VLProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""What the machine offers: device, arithmetic, threads."""

import torch

from cpt_rft.config.engine import EngineConfig
from cpt_rft.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(config: EngineConfig) -> EngineConfig:
    """Replace ``auto`` by this machine's device and by bfloat16 where its arithmetic units take it.

    Raises:
        ConfigError: The configuration asks for a GPU that is not there.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"the device of the engine {config.name} is {device}, but this machine has no usable GPU.",
            "set it to auto: engine.device=auto, or rft_engine.device=auto for an rft_engine",
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _has_bfloat16(device) else "float32"
    return config.model_copy(update={"device": device, "dtype": dtype})


def prepare(config: EngineConfig, rank: int | None = None) -> tuple[torch.dtype, str]:
    """Set the threads of this process and give the arithmetic and the device of a configuration.

    Args:
        config: The configuration.
        rank: Number of this process among several of a stage, which on GPUs take one each; none for one alone.
    """
    resolved = resolve(config)
    torch.set_num_threads(resolved.threads)
    spread = rank is not None and resolved.device == "cuda"
    return _DTYPES[resolved.dtype], f"cuda:{rank}" if spread else resolved.device


def _has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is computed as such, not emulated (which is slower than float32)."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

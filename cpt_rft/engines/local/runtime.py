"""What the machine offers: device, arithmetic, threads, a process a GPU."""

import torch

from cpt_rft.config.engine import EasyR1Config, EngineConfig, LlamaFactoryConfig
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
        raise ConfigError(f"engine.device is {device}, but this machine has no usable GPU.", "set engine.device=auto")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _has_bfloat16(device) else "float32"
    return config.model_copy(update={"device": device, "dtype": dtype})


def resolve_processes(config: LlamaFactoryConfig | EasyR1Config, device: str) -> int:
    """The processes of a framework on this machine: as many as it says, ``auto`` for one a GPU or one without a GPU.

    Args:
        config: The configuration.
        device: What its device came to (`resolve`).

    Raises:
        ConfigError: There are fewer GPUs.
    """
    gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
    processes = config.processes if config.processes != "auto" else max(1, gpus)
    if gpus and processes > gpus:
        raise ConfigError(
            f"processes of the engine {config.name} is {processes}, but this machine has {gpus} GPUs.",
            "use at most that many",
        )
    return processes


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

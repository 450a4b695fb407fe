"""What the machine offers: device, arithmetic, threads, memory, a process a GPU."""

import ctypes

import torch

from cpt_rft.config.engine import EasyR1Config, EngineConfig, LlamaFactoryConfig
from cpt_rft.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Settings of glibc's malloc.h: from which size on a tensor is mapped and unmapped by itself (older versions take 32 MB
# at most), and how much free memory is kept.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MAPPED_FROM, _KEPT = (2**30, 2**25), 2**31 - 1


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
    if resolved.device == "cpu":
        keep_freed_memory()
    spread = rank is not None and resolved.device == "cuda"
    return _DTYPES[resolved.dtype], f"cuda:{rank}" if spread else resolved.device


def keep_freed_memory() -> None:
    """Have this process keep what it frees for its next tensors instead of giving it back to the system.

    A large tensor's memory would else be mapped and zeroed page by page each time it is made, a tenth of a step on a
    CPU. Only glibc has the setting; other C libraries stay as they are.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None and any(setting(_M_MMAP_THRESHOLD, size) for size in _MAPPED_FROM):
        setting(_M_TRIM_THRESHOLD, _KEPT)


def give_back_freed_memory() -> None:
    """Give back what was kept so far, so that what one stage freed is not counted as the next one's memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is computed as such, not emulated (which is slower than float32)."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

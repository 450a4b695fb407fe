"""Low-rank adapters of peft on the stock model, which `network` computes like any other of its modules."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpt_rft.checkpoint import fresh_directory
from cpt_rft.config.restraints import Lora
from cpt_rft.errors import ConfigError, install_extra

_DECODER = "model.language_model"  # of the stock model: no adapter in the picture tower
_FILE_PREFIX = "base_model.model."
ADAPTER_NAME, WEIGHTS_NAME = "adapter", "adapter_model.safetensors"


class Adapter:
    """The adapters of one stage; from now on nothing else of the model is trained.

    An adapter adds ``alpha / rank * B A`` to a weight, A random and B zero at first.

    Source: LoRA, arXiv 2106.09685 section 4.1, equation 3; peft's Linear is the module. Differs from: A begins uniform,
    as in peft, where the paper draws it from a Gaussian; linear layers of the decoder by name, where the paper adapts
    attention weights only.

    Args:
        model: The stock model; its linear layers are replaced in place.
        settings: Rank, scale, where.
        seed: Of the initial A.

    Raises:
        ConfigError: peft is not installed.
    """

    def __init__(self, model: nn.Module, settings: Lora, seed: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError("LoRA needs the package peft.", install_extra("lora")) from error
        names = "|".join(settings.targets)
        self.config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=rf"{_DECODER}\..*\.({names})",
        )
        model.requires_grad_(False)
        with torch.random.fork_rng():  # peft draws from the global generator; what it drew is replaced below
            inject_adapter_in_model(self.config, model)
        self.scale = settings.alpha / settings.rank
        generator = torch.Generator().manual_seed(seed)
        self.down: dict[str, nn.Parameter] = {}
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.requires_grad_(True)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight.data, a=math.sqrt(5), generator=generator)
                self.down[_layer(name)] = weight

    def merged(self, start: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights of the model with the adapters added.

        Args:
            start: The weights that the adapters were trained on, by name, in float32.
            adapters: A and B of every layer, by name.
        """
        up = {_layer(name): weight for name, weight in adapters.items() if ".lora_B." in name}
        down = {_layer(name): weight for name, weight in adapters.items() if ".lora_A." in name}
        merged = {name: weight.detach() for name, weight in start.items()}
        for layer in down:
            name = f"{layer}.weight"
            merged[name] = merged[name] + self.scale * (up[layer] @ down[layer]).to(merged[name].device)
        return merged

    def save(self, directory: Path, adapters: Mapping[str, Tensor]) -> None:
        """Write the adapters in the form of peft, which loads them onto the stage's parent.

        Raises:
            CheckpointError: The directory cannot be written.
        """
        named = {
            f"{_FILE_PREFIX}{name.replace('.default.', '.')}": weight.detach().to("cpu", copy=True).contiguous()
            for name, weight in adapters.items()
        }
        with fresh_directory(directory) as partial:
            save_file(named, partial / WEIGHTS_NAME, metadata={"format": "pt"})
            config: dict[str, Any] = {key: _plain(value) for key, value in self.config.to_dict().items()}
            text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True)
            (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def read_down(directory: Path) -> dict[str, Tensor]:
    """A of every layer, as `Adapter.save` wrote it, by the layer's name in memory."""
    saved = load_file(directory / WEIGHTS_NAME)
    return {_layer(name.removeprefix(_FILE_PREFIX)): weight for name, weight in saved.items() if ".lora_A." in name}


def _layer(name: str) -> str:
    """The linear layer that a weight belongs to.

    >>> _layer("model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
    'model.language_model.layers.0.mlp.up_proj'
    """
    return name.partition(".lora_")[0]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value

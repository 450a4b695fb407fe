"""The recipe of the miniature base model: deterministic, resumable, one file of settings (`cpt-rft pretrain`)."""

import argparse
import hashlib
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator
from tokenizers import Tokenizer

from cpt_rft.algos.logprobs import token_logprobs
from cpt_rft.algos.sft import sft_loss
from cpt_rft.checkpoint import Policy, encode_prompts, load_policy, released_name
from cpt_rft.config.methods import SftMethod
from cpt_rft.engines.local.generate import end_token_ids
from cpt_rft.engines.local.network import Network
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.engines.local.packing import pack_blocks
from cpt_rft.errors import ConfigError
from cpt_rft.files import atomic_path, sha256_json, write_json_atomic
from cpt_rft.miniature.corpus import Reading, draw_reading, tokenizer_corpus
from cpt_rft.miniature.model import build_model, train_tokenizer, write_base
from cpt_rft.miniature.world import DRAWN
from cpt_rft.progress import make_display
from cpt_rft.seeds import derive_seed, python_random

RECIPE_NAME = "recipe.json"
DEFAULT_CONFIG = Path("configs/miniature_pretrain.yaml")
DEFAULT_OUT = Path(__file__).parent / "base"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Fraction = Annotated[float, Field(ge=0, le=1)]


class Phase(BaseModel):
    """Steps that draw their rows from one mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt
    direct_share: Fraction
    share: Mapping[str, Annotated[float, Field(ge=0)]]

    @field_validator("share")
    @classmethod
    def _something_to_draw(cls, share: Mapping[str, float]) -> Mapping[str, float]:
        if not sum(share.values()):
            raise ValueError("share names no task with a weight above 0")
        return share


class PretrainConfig(BaseModel):
    """The settings of ``configs/miniature_pretrain.yaml``, which explains each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    rows_per_step: PositiveInt
    lr: PositiveFloat
    warmup_ratio: Fraction
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: PositiveFloat
    vocab_size: PositiveInt
    corpus_rows: PositiveInt
    init_scale: PositiveFloat
    loose_share: Fraction
    dtype: Literal["float32", "bfloat16"]
    save_every: PositiveInt
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_of(self, step: int) -> Phase:
        """The phase that a step, counted from 0, lies in."""
        ends = accumulate(phase.steps for phase in self.phases)
        return next(phase for phase, end in zip(self.phases, ends, strict=True) if step < end)

    @property
    def recipe_hash(self) -> str:
        """A hash of every setting, kept with the weights."""
        return sha256_json(self.model_dump(mode="json"))

    def method(self) -> SftMethod:
        """The same settings in the words of the optimiser."""
        return SftMethod(
            name="pretrain",
            kind="sft",
            style="direct",
            lr=self.lr,
            schedule="cosine",
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            betas=self.betas,
            max_grad_norm=self.max_grad_norm,
            prompts_per_step=self.rows_per_step,
            micro_batch=self.rows_per_step,
        )


def load_config(path: Path) -> PretrainConfig:
    """Read the recipe.

    Raises:
        ConfigError: The file is missing, a key is unknown or has a wrong value, or a task is not one of the world's.
    """
    try:
        config = PretrainConfig.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist.", f"use {DEFAULT_CONFIG}") from error
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}", f"compare it with {DEFAULT_CONFIG}") from error
    unknown = {task for phase in config.phases for task in phase.share} - set(DRAWN)
    if unknown:
        raise ConfigError(f"{path}: a phase's share names unknown tasks {sorted(unknown)}.", f"use {', '.join(DRAWN)}")
    return config


def rows_of_step(config: PretrainConfig, step: int) -> list[Reading]:
    """The fresh rows of one step; they depend on the seed and the step alone, so that a resumed run draws the same."""
    rng = python_random("pretrain", config.seed, step)
    phase = config.phase_of(step)
    tasks = rng.choices(list(phase.share), list(phase.share.values()), k=config.rows_per_step)
    return [draw_reading(task, phase.direct_share, config.loose_share, rng) for task in tasks]


def start_model(config: PretrainConfig, tokenizer: Tokenizer) -> Any:
    """The untrained model. A width of 128 learns several times faster from 1/sqrt(inputs) than from Qwen's 0.02."""
    model = build_model(config.vocab_size, derive_seed("pretrain weights", config.seed))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                inputs = weight[0].numel()
                weight.mul_(config.init_scale * inputs**-0.5 / model.config.text_config.initializer_range)
    return model


def step_loss(policy: Policy, network: Network, rows: list[Reading]) -> torch.Tensor:
    """The mean loss a target token of some rows."""
    end = int(end_token_ids(policy)[0])
    targets = [[*policy.tokenizer.encode(row.target, add_special_tokens=False), end] for row in rows]
    contexts = network.contexts(encode_prompts(policy, [(row.pictures, row.user) for row in rows]))
    blocks = pack_blocks(contexts, [[target] for target in targets])
    logprobs = token_logprobs(network.logits(contexts, blocks), blocks.targets)
    return sft_loss(logprobs, torch.ones_like(logprobs), len(logprobs))


def pretrain(config: PretrainConfig, out: Path, work: Path) -> None:
    """Train the base model and write it to ``out``, which must not exist. ``work`` holds the resume point.

    Raises:
        CheckpointError: ``out`` exists already.
        TrainingError: The loss stays non-finite.
    """
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(tokenizer_corpus(config.corpus_rows), config.vocab_size)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        start = Path(scratch) / "start"
        write_base(start, start_model(config, tokenizer), tokenizer)
        policy = load_policy(start)
    optimiser = Optimiser(policy.model, config.method(), config.steps, dtype=_DTYPES[config.dtype], max_skipped=3)
    network = Network(policy.model)
    state = work / "state.pt"
    done = _resume(state, config, optimiser)
    with make_display({"pretrain": 1.0}) as display:
        for step in range(done, config.steps):
            loss = step_loss(policy, network, rows_of_step(config, step))
            optimiser.backward(loss)
            optimiser.step(step, float(loss.detach()))
            text = f"step {step + 1} of {config.steps}, loss {float(loss.detach()):.3f}"
            display.update("pretrain", (step + 1) / config.steps, text)
            if (step + 1) % config.save_every == 0:
                with atomic_path(state) as partial:
                    torch.save(
                        {"recipe": config.recipe_hash, "step": step + 1, "optimiser": optimiser.state()}, partial
                    )
    publish(config, optimiser.named_weights(), tokenizer, out)
    shutil.rmtree(work)


def publish(config: PretrainConfig, weights: Mapping[str, torch.Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Write the finished base with the recipe that made it."""
    model = build_model(config.vocab_size, 0)
    model.load_state_dict(weights)
    write_base(out, model, tokenizer)
    recipe = {"recipe_sha256": config.recipe_hash, "weights_sha256": weights_hash(model.state_dict())}
    write_json_atomic(out / RECIPE_NAME, {**recipe, "config": config.model_dump(mode="json")})


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of names and float32 values, whatever file they lie in."""
    digest = hashlib.sha256()
    for name, weight in sorted((released_name(name), weight) for name, weight in weights.items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resume(state: Path, config: PretrainConfig, optimiser: Optimiser) -> int:
    """Restore the optimiser from the resume point of the same recipe; how many steps were done."""
    try:
        saved = torch.load(state, map_location="cpu", weights_only=True)
    except (FileNotFoundError, RuntimeError, EOFError, pickle.UnpicklingError):
        return 0
    if saved["recipe"] != config.recipe_hash:
        return 0
    optimiser.restore(saved["optimiser"])
    return int(saved["step"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cpt-rft pretrain``."""
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="the recipe (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="directory to write (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    """Run ``cpt-rft pretrain``."""
    config = load_config(arguments.config)
    pretrain(config, arguments.out, arguments.out.with_name(arguments.out.name + ".work"))

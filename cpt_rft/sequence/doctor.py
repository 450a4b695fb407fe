"""What would stop a long run, found before it begins. Each finding says what to do about it."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt_rft.config.engine import EasyR1Config, LlamaFactoryConfig
from cpt_rft.config.load import find_directory
from cpt_rft.config.schema import Experiment
from cpt_rft.errors import UserError
from cpt_rft.sequence.doctor_easyr1 import easyr1_parts
from cpt_rft.sequence.finding import Finding, compare_with_lock
from cpt_rft.sequence.plan import Selection
from cpt_rft.sequence.sizes import gib, measured
from cpt_rft.sequence.status import plan

SHARED_BYTES = 1 << 30  # what data loaders and NCCL of one machine want of /dev/shm


def examine(experiment: Experiment, selection: Selection) -> list[Finding]:
    """Look at all that a run needs; an examination that fails is a finding too."""
    base = find_directory(experiment.base_model)
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "model": lambda: _model(base),
        "a row": lambda: _row(experiment, base),
        "data": lambda: _data(experiment),
        "disk": lambda: _disk(experiment, selection),
    }
    chains = selection.chains(experiment, Path(experiment.output))
    for engine in experiment.engines.values():
        own = [chain for chain in chains if experiment.engine_for(chain.method) is engine]
        if own and isinstance(engine, LlamaFactoryConfig):
            parts |= _llamafactory(engine, base)
        elif own and isinstance(engine, EasyR1Config):
            parts |= easyr1_parts(engine, own, base)
    found: list[Finding] = []
    for what, look in parts.items():
        try:
            found += look()
        except UserError as error:
            found.append(Finding(what, "problem", error.problem, error.fix))
    return found


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Plain data."""
    return [asdict(finding) for finding in findings]


def _model(base: Path) -> Iterator[Finding]:
    from cpt_rft.checkpoint import verify_weights
    from cpt_rft.vision import VisionSpec

    if not base.is_dir():
        yield Finding("model", "problem", f"{base} is not there.", "download it there, or set base_model=DIRECTORY")
        return
    verify_weights(base)
    spec = VisionSpec.read(base)
    yield Finding("model", "ok", f"{base}: weights whole, {spec.min_pixels} to {spec.max_pixels} pixels a picture")


def _row(experiment: Experiment, base: Path) -> Iterator[Finding]:
    """One row through the base's own template, tokenizer and image processor."""
    if not base.is_dir():
        return
    from transformers import AutoTokenizer

    from cpt_rft.data.picture import decode_picture
    from cpt_rft.data.prepare import choose_rows
    from cpt_rft.data.tokens import PromptCounter
    from cpt_rft.miniature.world import make_rows
    from cpt_rft.pictures import image_processor
    from cpt_rft.prompts import user_text
    from cpt_rft.vision import VisionSpec

    if not measured(experiment.data, experiment.tasks):
        return
    task = experiment.tasks[0]
    drawn = experiment.data.source == "miniature"
    row = make_rows(task, "train", 1, 0)[0] if drawn else choose_rows(experiment.data, f"{task}/train", 1)[0]
    spec = VisionSpec.read(base).with_limits(*experiment.engine.pixel_limits)
    pictures = [decode_picture(data, row.id) for data in row.images]
    tokens = [spec.image_tokens(picture.height, picture.width) for picture in pictures]
    if pictures:
        grid = image_processor(spec)(images=pictures, return_tensors="np")["image_grid_thw"]
        seen = [int(one.prod()) // spec.merge_size**2 for one in grid]
        if seen != tokens:
            fix = "this image processor resizes in another way: report it with the model's name"
            yield Finding("a row", "problem", f"{row.id}: {seen} picture tokens, {tokens} by formula.", fix)
            return
    AutoTokenizer.from_pretrained(base, local_files_only=True)
    style = next(iter(experiment.methods.values())).style
    count = PromptCounter(base)(user_text(row, style, experiment.data.prompt_preset), tokens)
    yield Finding("a row", "ok", f"{row.id}: {count} tokens, {sum(tokens)} of them for pictures")


def _data(experiment: Experiment) -> Iterator[Finding]:
    if measured(experiment.data, experiment.tasks):
        yield Finding("data", "ok", "every task is prepared" if experiment.data.source == "hub" else "drawn here")
        return
    tasks = " ".join(experiment.tasks)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = endpoint.partition("://")[2].partition("/")[0].partition(":")[0]
    try:
        socket.getaddrinfo(host, 443)
        reach = f"{host} can be looked up from here"
    except OSError:
        reach = f"{host} cannot be reached from here: prepare on another machine and copy, or set HF_ENDPOINT"
    yield Finding("data", "problem", f"Tasks are not prepared; {reach}.", f"bash scripts/prepare_data.sh {tasks}")


def _disk(experiment: Experiment, selection: Selection) -> Iterator[Finding]:
    result = plan(experiment, selection)
    needed, free = result["disk_peak_bytes"], result["disk_free_bytes"]
    text = f"about {gib(needed)} at the peak, {gib(free)} free in {experiment.output}"
    if needed > free:
        yield Finding(
            "disk", "problem", text, "free some, choose another place with output=DIRECTORY, or fewer methods"
        )
    else:
        yield Finding("disk", "ok", text)


def _llamafactory(engine: LlamaFactoryConfig, base: Path) -> dict[str, Callable[[], Iterator[Finding]]]:
    """What LLaMA-Factory needs, by name."""
    return {
        "environment": lambda: _environment(engine),
        "GPUs": lambda: _gpus(engine, base),
        "shared memory": lambda: _shared(engine),
        "port": lambda: _port(engine),
    }


def _environment(engine: LlamaFactoryConfig) -> Iterator[Finding]:
    from cpt_rft.engines.environment import find_environment, installed_versions

    place = find_environment("llamafactory", engine.environment)
    yield from compare_with_lock("environment", "llamafactory", "llamafactory", place)
    there = installed_versions(place)
    if engine.attention == "fa2" and "flash-attn" not in there:
        yield Finding("environment", "problem", "flash-attn is not installed.", "install it there, or attention=sdpa")
    if engine.ray and not {"ray", "aiohttp-cors"} <= there.keys():  # the second comes with the extra alone
        text, fix = "ray[default] is not installed.", "install it there, or set engine.ray=false"
        yield Finding("environment", "problem", text, fix)


def _gpus(engine: LlamaFactoryConfig, base: Path) -> Iterator[Finding]:
    import torch

    from cpt_rft.engines.llamafactory.engine import on_this_machine
    from cpt_rft.engines.llamafactory.estimate import Shape, state_bytes

    resolved = on_this_machine(engine)
    if not resolved.device.startswith("cuda"):
        fix = "a 7B model needs GPUs; the miniature does not"
        yield Finding("GPUs", "warning", "none: training will be on the processor.", fix)
        return
    have = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    need = state_bytes(resolved, Shape.read(base))[0] if base.is_dir() else 0
    text = f"{resolved.processes} processes; {gib(have)} a GPU, about {gib(need)} of it for weights and optimizer"
    if need > have:
        yield Finding("GPUs", "problem", text, "use engine.deepspeed=zero3 or zero3_offload, or more GPUs")
    else:
        yield Finding("GPUs", "ok", text)


def _shared(engine: LlamaFactoryConfig) -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    free = shutil.disk_usage(place).free
    many = engine.processes != 1 or engine.workers_a_process
    if many and free < SHARED_BYTES:
        yield Finding(
            "shared memory", "problem", f"{gib(free)} free in {place}.", "start the container with --shm-size=16g"
        )
    else:
        yield Finding("shared memory", "ok", f"{gib(free)} free in {place}")


def _port(engine: LlamaFactoryConfig) -> Iterator[Finding]:
    port = os.environ.get("MASTER_PORT")
    if port is None:
        if engine.nodes > 1:
            yield Finding("port", "problem", "MASTER_PORT is not set.", "export one that is free on the first node")
        return
    with socket.socket() as probe:
        try:
            probe.bind(("", int(port)))
        except (OSError, ValueError, OverflowError):
            yield Finding("port", "problem", f"MASTER_PORT {port} is taken or no port.", "export another one")
            return
    yield Finding("port", "ok", f"MASTER_PORT {port} is free here")

"""What would stop EasyR1: its environment, its rules, the GPUs, the machine's memory, the Ray cluster."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cpt_rft.config.engine import EasyR1Config
from cpt_rft.sequence.finding import Finding, compare_with_lock
from cpt_rft.sequence.native_easyr1 import check_chain
from cpt_rft.sequence.plan import Chain
from cpt_rft.sequence.sizes import gib

CAPABILITY = (8, 0)  # of a GPU, for the attention that the framework asks for by name


def easyr1_parts(
    engine: EasyR1Config, chains: Sequence[Chain], base: Path
) -> dict[str, Callable[[], Iterator[Finding]]]:
    """What EasyR1 needs, by name.

    Args:
        engine: How to compute.
        chains: The chains that it trains.
        base: Directory of the base checkpoint.
    """
    return {
        "EasyR1's environment": lambda: _environment(engine),
        "EasyR1's rules": lambda: _rules(engine, chains, base),
        "EasyR1's GPUs": lambda: _gpus(engine, chains, base),
        "memory": lambda: _memory(engine, chains, base),
        "Ray": lambda: _ray(engine),
    }


def _environment(engine: EasyR1Config) -> Iterator[Finding]:
    from cpt_rft.engines.easyr1.machine import NAME, environment_of, lock_name, on_this_machine
    from cpt_rft.engines.easyr1.packages import check_packages
    from cpt_rft.engines.environment import installed_versions

    what, resolved = "EasyR1's environment", on_this_machine(engine)
    place = environment_of(resolved)
    there = installed_versions(place)
    check_packages(there)
    yield from compare_with_lock(what, NAME, lock_name(resolved), place)
    if resolved.device == "cuda" and "flash-attn" not in there:
        fix = f"{place / 'bin' / 'python'} -m pip install flash-attn==2.8.3 --no-build-isolation"
        yield Finding(what, "problem", "flash-attn is not installed.", fix)


def _rules(engine: EasyR1Config, chains: Sequence[Chain], base: Path) -> Iterator[Finding]:
    from cpt_rft.engines.easyr1.machine import planned
    from cpt_rft.engines.easyr1.rules import RULES

    for chain in chains:
        check_chain(planned(engine), chain, base)
    yield Finding("EasyR1's rules", "ok", f"all {len(RULES)} hold for {', '.join(chain.label for chain in chains)}")


def _gpus(engine: EasyR1Config, chains: Sequence[Chain], base: Path) -> Iterator[Finding]:
    import torch

    from cpt_rft.engines.easyr1.machine import on_this_machine

    what, resolved = "EasyR1's GPUs", on_this_machine(engine)
    if resolved.device == "cpu":
        fix = "a 7B model needs GPUs; the miniature does not"
        yield Finding(what, "warning", "none: one worker will train on the processor.", fix)
        return
    if not torch.cuda.is_available():
        yield Finding(what, "ok", "those of the Ray cluster; their memory cannot be seen from here")
        return
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    old = [card.name for card in cards if (card.major, card.minor) < CAPABILITY]
    if old:
        yield Finding(what, "problem", f"{old[0]} is too old for the framework's attention.", "use A100 or later")
    if base.is_dir():
        yield gpu_memory(resolved, chains, base, min(card.total_memory for card in cards))


def gpu_memory(engine: EasyR1Config, chains: Sequence[Chain], base: Path, have: int) -> Finding:
    """Whether the worst moments of a stage fit a GPU."""
    from cpt_rft.engines.easyr1.estimate import memory
    from cpt_rft.engines.easyr1.methods import supported_method
    from cpt_rft.engines.llamafactory.estimate import Shape
    from cpt_rft.vision import VisionSpec

    shape, spec = Shape.read(base), VisionSpec.read(base).with_limits(*engine.pixel_limits)
    needs = [memory(engine, supported_method(chain.method), shape, spec) for chain in chains]
    update = max(need.state + need.update for need in needs)
    share = int(engine.gpu_memory_utilization * have)
    writing = max(need.waiting for need in needs) + share
    weights = max(need.writing for need in needs)
    text = (
        f"{gib(have)} a GPU; at most {gib(update)} in the update, {gib(writing)} while the model writes"
        f" ({gib(share)} of it vLLM's, for {gib(weights)} of weights and its cache)"
    )
    if max(update, writing) > have or weights > share:
        fix = "set offload=true, a smaller micro_batch_update or another gpu_memory_utilization, or use more GPUs"
        return Finding("EasyR1's GPUs", "problem", text, fix)
    return Finding("EasyR1's GPUs", "ok", text)


def _memory(engine: EasyR1Config, chains: Sequence[Chain], base: Path) -> Iterator[Finding]:
    """The machine's own memory, for the weights that a node's first worker loads and for what is offloaded."""
    if not base.is_dir():
        return
    from cpt_rft.engines.easyr1.estimate import memory
    from cpt_rft.engines.easyr1.machine import planned
    from cpt_rft.engines.easyr1.methods import supported_method
    from cpt_rft.engines.llamafactory.estimate import Shape
    from cpt_rft.vision import VisionSpec

    resolved, shape, spec = planned(engine), Shape.read(base), VisionSpec.read(base)
    need = max(memory(resolved, supported_method(chain.method), shape, spec).machine for chain in chains)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{gib(have)} in this machine, about {gib(need)} for weights, besides pictures and Ray's own"
    fix = "use a machine with more; without offload=true it is less"
    yield Finding("memory", "problem" if need > have else "ok", text, fix if need > have else "")


def _ray(engine: EasyR1Config) -> Iterator[Finding]:
    from cpt_rft.engines.easyr1.cluster import check_cluster
    from cpt_rft.engines.easyr1.machine import environment_of, on_this_machine

    resolved = on_this_machine(engine)
    yield Finding("Ray", "ok", check_cluster(resolved, environment_of(resolved)))

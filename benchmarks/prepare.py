"""How fast pictures are prepared, beside Pillow's bare decoding of the same pictures in the same run.

Usage: python benchmarks/prepare.py [--pictures N] [--processes N ...] [--rounds N]. The rows are 640 x 480 JPEGs held
in memory; a prepare decodes, hashes, compares and writes them. Rates are pictures a second of processor time, so that
other work on the machine does not count; the wall clock is given beside them.
Several numbers of processes take turns, round by round, and medians over the rounds are told.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cpt_rft.data.config import Checks
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.pipeline import Settings, prepare_task
from cpt_rft.data.source import Source
from cpt_rft.tasks.base import Task, TaskConfig

DISTINCT = 64  # pictures that are really drawn; the others are variants of them
BARE = 2000  # pictures that are decoded barely, before and after each prepare


class Pictures(Task):
    """As many rows as asked for, made on the way."""

    def __init__(self, count: int) -> None:
        settings = {"name": "pictures", "reader": "jigsaw", "kind": "short_text", "prompts": {"task": ""}}
        super().__init__(TaskConfig.model_validate(settings | {"splits": {"train": "train"}}))
        self.count = count
        self.drawn = [draw(number) for number in range(DISTINCT)]

    def source(self, cache: Path) -> Source:
        """No files."""
        return Source(None, None, None, (), {"train": self.count})

    def rows(self, split: Split, source: Source) -> Iterator[Example | Drop]:
        """The rows, one at a time."""
        for number in range(self.count):
            name = f"pictures/{split}/{number:06d}"
            yield Example(
                id=name,
                task="pictures",
                split=split,
                images=(self.encoded(number),),
                image_paths=(f"{name}.jpg",),
                problem=f"<image>What is picture {number}?",
                answer="a thing",
                references=("a thing",),
                kind="short_text",
            )

    def encoded(self, number: int) -> bytes:
        """A JPEG file with pixels that no other row has."""
        variant, drawn = divmod(number, DISTINCT)
        return altered(self.drawn[drawn], variant)


def altered(drawn: bytes, variant: int) -> bytes:
    """The JPEG file with another quantiser for each of 2,540 variants: one of its first ten entries is greater."""
    more, place = divmod(variant, 10)
    place += drawn.index(b"\xff\xdb") + 5 + 1
    return drawn[:place] + bytes([(drawn[place] + more) % 255 + 1]) + drawn[place + 1 :]


def draw(number: int) -> bytes:
    """A JPEG with the weight of a photograph: smooth shapes, and noise over them."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def seconds() -> float:
    """Processor time of this process and its ended children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def decode(task: Pictures, count: int) -> float:
    """Processor time of plain decoding in this process."""
    start = time.process_time()
    for number in range(count):
        with Image.open(BytesIO(task.encoded(number))) as picture:
            picture.convert("RGB")
    return time.process_time() - start


def bare(task: Pictures, count: int, processes: int) -> float:
    """Pictures a second of processor time of plain decoding, by as many processes at once as prepare.

    Cores that share their units slow each other down; so the reference is slowed down in the same way.
    """
    if processes == 1:
        return count / decode(task, count)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        spent = pool.map(decode, [task] * processes, [count] * processes)
        return processes * count / sum(spent)


def prepared(task: Pictures, processes: int) -> tuple[float, float]:
    """Pictures a second of a whole prepare: of processor time, and on the clock."""
    with tempfile.TemporaryDirectory() as folder:
        start, clock = seconds(), time.perf_counter()
        prepare_task(task, Path(folder), Path(folder), Settings(Checks(), processes=processes))
        return task.count / (seconds() - start), task.count / (time.perf_counter() - clock)


class Turn(NamedTuple):
    """One prepare between two stretches of bare decoding: pictures a second."""

    bare: float
    prepared: float
    on_the_clock: float


def turn(task: Pictures, processes: int) -> Turn:
    """The mean of the bare rates before and after is the reference."""
    some = min(task.count, BARE)
    before = bare(task, some, processes)
    rate, clock = prepared(task, processes)
    return Turn((before + bare(task, some, processes)) / 2, rate, clock)


def peak_mib(processes: int) -> float:
    """The most memory this program held, and as much again for each other process as the largest of them held.

    On Linux the first is not asked of getrusage, which also counts the parent at the fork.
    """
    status = Path("/proc/self/status")
    unit = 2**10 if status.is_file() else 2**20  # macOS counts bytes
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit if processes > 1 else 0.0
    if status.is_file():
        own = int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return own + processes * largest


def measure(count: int, processes: Sequence[int], rounds: int) -> dict[str, object]:
    """Every number of processes in turn, so often; the ratio on the clock is taken within a round."""
    prepared(Pictures(1), 1)  # imports are not counted
    task = Pictures(count)
    turns: dict[int, list[Turn]] = {number: [] for number in processes}
    for _ in range(rounds):
        for number in processes:
            turns[number].append(turn(task, number))
    first = turns[processes[0]]
    told = {}
    for number, made in turns.items():
        told[str(number)] = {
            "bare_a_second": round(statistics.median(one.bare for one in made), 1),
            "prepared_a_second": round(statistics.median(one.prepared for one in made), 1),
            "share_of_bare": round(statistics.median(one.prepared / one.bare for one in made), 3),
            "prepared_a_second_on_the_clock": round(statistics.median(one.on_the_clock for one in made), 1),
            "times_as_fast_on_the_clock": round(
                statistics.median(
                    one.on_the_clock / other.on_the_clock for one, other in zip(made, first, strict=True)
                ),
                2,
            ),
        }
    return {
        "pictures": count,
        "rounds": rounds,
        "cores": os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 1),
        "bytes_a_picture": sum(map(len, task.drawn)) // DISTINCT,
        "peak_mib": round(peak_mib(max(processes)), 1),
        "processes": told,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(measure(options.pictures, options.processes, options.rounds), indent=2))

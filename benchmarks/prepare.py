"""How fast pictures are prepared, beside Pillow's bare decoding of the same pictures in the same run.

Usage: python benchmarks/prepare.py [--pictures N] [--processes N] [--json FILE]. The rows are 640 x 480 JPEGs held in
memory; a prepare decodes, hashes, compares and writes them twice (parts, then the split). Rates are pictures a second
of processor time, so that other work on the machine does not count; the wall clock is given beside them.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from cpt_rft.data.checks import Checks
from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.data.pipeline import Settings, prepare_task
from cpt_rft.data.source import Source
from cpt_rft.tasks.base import Task, TaskConfig

DISTINCT = 64  # pictures that are really drawn; the others are variants of them


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
        """A JPEG file with pixels that no other row has: one of the first entries of its quantiser is its own."""
        drawn = bytearray(self.drawn[number % DISTINCT])
        variant = number // DISTINCT
        drawn[drawn.index(b"\xff\xdb") + 5 + 1 + variant % 10] = 1 + variant // 10
        return bytes(drawn)


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


def bare(task: Pictures, count: int) -> float:
    """Pictures a second of plain decoding."""
    start = seconds()
    for number in range(count):
        with Image.open(BytesIO(task.encoded(number))) as picture:
            picture.convert("RGB")
    return count / (seconds() - start)


def prepared(task: Pictures, processes: int) -> tuple[float, float]:
    """Pictures a second of a whole prepare: of processor time, and on the clock."""
    with tempfile.TemporaryDirectory() as folder:
        start, clock = seconds(), time.perf_counter()
        prepare_task(task, Path(folder), Path(folder), Settings(Checks(), processes=processes))
        return task.count / (seconds() - start), task.count / (time.perf_counter() - clock)


def peak_mib() -> float:
    """The most memory this program held; on Linux not by getrusage, which also counts the parent at the fork."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def measure(count: int, processes: int) -> Mapping[str, float]:
    """One round: bare, prepare, bare again; the mean of the two bare rates is the reference."""
    prepared(Pictures(1), 1)  # imports are not counted
    task = Pictures(count)
    before = bare(task, min(count, 500))
    rate, clock = prepared(task, processes)
    after = bare(task, min(count, 500))
    reference = (before + after) / 2
    return {
        "pictures": count,
        "processes": processes,
        "cores": os.cpu_count() or 1,
        "bytes_a_picture": sum(map(len, task.drawn)) // DISTINCT,
        "bare_a_second": round(reference, 1),
        "prepared_a_second": round(rate, 1),
        "share_of_bare": round(rate / reference, 3),
        "prepared_a_second_on_the_clock": round(clock, 1),
        "peak_mib": round(peak_mib(), 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = json.dumps(measure(options.pictures, options.processes), indent=2)
    print(result)
    if options.json:
        options.json.write_text(result + "\n")

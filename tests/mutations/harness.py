"""Do the tests notice? Each listed mutation is applied to a copy of the tree and its named tests must then fail.

Run by ``scripts/mutate.sh [--jobs N] [--only TEXT]``. Exit code 0 only if every mutation is killed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import yaml

from tests.helpers.tree import ROOT, copy_tree

LIST = Path(__file__).with_name("mutations.yaml")
TIMEOUT_SECONDS = 300  # of one mutation, which may make a loop endless
Outcome = Literal["killed", "survived", "no match", "tests broken"]


@dataclass(frozen=True)
class Mutation:
    """One wrong edit: `old`, which occurs exactly once in `file`, becomes `new`; `tests` are pytest selections."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"

    def matches(self, root: Path) -> bool:
        path = root / self.file
        return self.old != self.new and path.is_file() and path.read_text().count(self.old) == 1


def read_list(path: Path = LIST) -> list[Mutation]:
    """The mutations of a YAML file: per file of ours its tests and a list of [old, new]."""
    entries = yaml.safe_load(path.read_text())
    return [
        Mutation(entry["file"], old, new, tuple(entry["tests"])) for entry in entries for old, new in entry["mutations"]
    ]


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float | None = None) -> tuple[int, str]:
    """Exit code and output of pytest on the copy; the copy comes before the installed package, without byte code."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, timeout=timeout_s, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return 1, ""
    return done.returncode, done.stdout + done.stderr


def try_mutation(tree: Path, mutation: Mutation) -> Outcome:
    """Apply, test, take back. Pytest's 0 is a survivor, 1 a failed test, 2 an error at import."""
    if not mutation.matches(tree):
        return "no match"
    path = tree / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        code, _ = run_tests(tree, mutation.tests, TIMEOUT_SECONDS)
    finally:
        path.write_text(original)
    return "survived" if code == 0 else "killed" if code in (1, 2) else "tests broken"


def campaign(root: Path, mutations: Sequence[Mutation], jobs: int) -> list[tuple[Mutation, Outcome]]:
    """Try every mutation, after the named tests have passed on the tree as it is."""
    with tempfile.TemporaryDirectory(prefix="cpt-rft-mutations-") as scratch:
        trees: SimpleQueue[Path] = SimpleQueue()
        for worker in range(jobs):
            copy_tree(Path(scratch, str(worker)), root)
            trees.put(Path(scratch, str(worker)))
        selected = sorted({test for mutation in mutations for test in mutation.tests})
        first = trees.get()
        code, output = run_tests(first, selected) if selected else (0, "")
        if code:
            print(output[-3000:], file=sys.stderr)
            return [(mutation, "tests broken") for mutation in mutations]
        trees.put(first)

        def attempt(mutation: Mutation) -> tuple[Mutation, Outcome]:
            tree = trees.get()
            try:
                outcome = try_mutation(tree, mutation)
            finally:
                trees.put(tree)
            print(f"{outcome:>12}  {mutation}", flush=True)
            return mutation, outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(attempt, mutations))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="copies tried side by side")
    parser.add_argument("--only", default="", help="only the mutations whose file contains this text")
    arguments = parser.parse_args()
    mutations = [mutation for mutation in read_list() if arguments.only in mutation.file]
    print(f"{len(mutations)} mutations; first the named tests on the tree as it is", flush=True)
    results = campaign(ROOT, mutations, arguments.jobs)
    alive = [(mutation, outcome) for mutation, outcome in results if outcome != "killed"]
    print(f"{len(results) - len(alive)} of {len(results)} mutations killed")
    for mutation, outcome in alive:
        print(f"NOT KILLED ({outcome})  {mutation}")
    return 1 if alive or not results else 0


if __name__ == "__main__":
    sys.exit(main())

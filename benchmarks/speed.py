"""How fast the local engine is beside its peers: both sides do the same work in turn, each in a process of its own.

Usage: python benchmarks/speed.py LINE... [--size 192x4] [--rounds N] [--device cpu|cuda] [--out DIR]. Every line is
one figure of docs/speed.md (``python benchmarks/table.py`` writes it); ``all`` is every line. Peers run in locked
environments, made when first needed (benchmarks/envs/setup.sh). On a CPU the figures are processor time at one thread,
which other work on the machine disturbs least; on a GPU the wall clock.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import SIZES, write_case
from operations import Model, operations

ROOT = Path(__file__).resolve().parents[1]
SIDES = ROOT / "benchmarks/sides"
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        case: Which work.
        peer: Script of the other side; ``ours`` compares us with ourselves.
        environment: Lock of the peer, or none for our own environment.
        what: Its name in the table.
        floor: The least ratio asked for at 192x4, or none.
        ours: Settings of our side only.
        theirs: Settings of the other side only.
        both: Settings of both.
    """

    case: str
    peer: str
    environment: str
    what: str
    floor: float | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)


FROZEN, TRAINED = {"frozen": True}, {"frozen": False}
GENERATE = ("peer_transformers", "trl")
LF, TRL = ("peer_llamafactory", "llamafactory"), ("peer_trl", "trl")
LINES = {
    "grpo_short": Line("grpo_short", *TRL, "GRPO step, short prompt, TRL", 4.0),
    "grpo_long": Line("grpo_long", *TRL, "GRPO step, long prompt, TRL", 6.0),
    "grpo_best_precision": Line(
        "grpo_short", *TRL, "GRPO step, ours in bfloat16, TRL in float32", 6.0, ours={"dtype": "bfloat16"}
    ),
    "grpo_zero_groups": Line(
        *("grpo_short", "ours", "", "GRPO step, two of four groups without a signal, all with one"),
        ours={"zero_groups": 2},
    ),
    "rollout_transformers": Line("rollout", *GENERATE, "rollouts, transformers generate", 2.5),
    "rollout_vllm": Line("rollout", "peer_vllm", "vllm", "rollouts, vLLM", 2.0),
    "sft_frozen_llamafactory": Line("sft", *LF, "SFT step, tower frozen, LLaMA-Factory", 1.5, both=FROZEN),
    "sft_trained_llamafactory": Line("sft", *LF, "SFT step, tower trained, LLaMA-Factory", 1.5, both=TRAINED),
    "sft_frozen_trl": Line("sft", *TRL, "SFT step, tower frozen, TRL", 1.5, both=FROZEN),
    "sft_trained_trl": Line("sft", *TRL, "SFT step, tower trained, TRL", 1.5, both=TRAINED),
    "evaluate_transformers": Line(
        "evaluate", *GENERATE, "evaluation of 512 rows, transformers generate", 1.3, both={"batch": 64}
    ),
}  # fmt: skip


class Side:
    """A running process of one side."""

    def __init__(self, python: str, script: str, folder: Path, case: dict[str, Any]) -> None:
        self.script, self.log = script, folder / f"{script}.log"
        threads = {"OMP_NUM_THREADS": str(case["threads"]), "MKL_NUM_THREADS": str(case["threads"])}
        ours = {"PYTHONPATH": str(ROOT)} if script == "ours" else {}
        self.process = subprocess.Popen(
            [python, str(SIDES / f"{script}.py"), str(folder), json.dumps(case)],
            env={**os.environ, **QUIET, **VLLM, **threads, **ours},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
        )
        self.versions = {key: value for key, value in self.hear().items() if key != "ready"}

    def ask(self, what: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next message; stops with the side's last words if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            words = [each for each in self.log.read_text().splitlines() if each.strip()]
            raise SystemExit(f"{self.script} ended: {words[-1] if words else 'no message'} (whole log: {self.log})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def environment(name: str) -> str:
    """The Python of a peer's environment, made if it is not there."""
    if not name:
        return sys.executable
    made = subprocess.run(
        ["bash", str(ROOT / "benchmarks/envs/setup.sh"), name], stdout=subprocess.PIPE, text=True, check=True
    )
    return made.stdout.split()[-1]


def measure(name: str, folder: Path, size: str, rounds: int, device: str, seed: int = 0) -> dict[str, Any]:
    """Run both sides in turn, in alternating order; the first round warms up and does not count."""
    line = LINES[name]
    write_case(folder, line.case, size, seed)
    case = {"threads": 1, "device": device, "dtype": "float32", "batch": 0, "frozen": False} | line.both
    sides = [
        Side(sys.executable, "ours", folder, case | line.ours),
        Side(environment(line.environment), line.peer, folder, case | line.theirs),
    ]
    told: list[list[dict[str, Any]]] = [[], []]
    rates = []
    for number in range(rounds + 1):
        rates.append(sides[0].ask("rate")["rate"])
        for index in (0, 1) if number % 2 else (1, 0):
            answer = sides[index].ask("go")
            if number:
                told[index].append(answer)
    for side in sides:
        side.close()
    content = json.loads((folder / "case.json").read_text()) | case
    model = Model.read(json.loads((folder / "model/config.json").read_text()))
    needed = [operations(model, content, shared=shared) for shared in (True, False)]
    rate = statistics.median(each[(case | line.ours)["dtype"]] for each in rates)
    clock = "cpu" if device == "cpu" else "wall"
    seconds = [[each[clock] for each in side] for side in told]
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
    shape = {
        key: content[key] for key in ("work", "prompts", "group", "picture", "prompt_tokens", "spread", "new_tokens")
    }
    return {
        "line": name,
        "what": line.what,
        "command": f"python benchmarks/speed.py {name} --size {size} --rounds {rounds} --device {device}",
        "size": size,
        "seed": seed,
        "case": shape | {"ours": case | line.ours, "theirs": case | line.theirs},
        "machine": machine(device),
        "versions": {"ours": sides[0].versions, "peer": sides[1].versions},
        "clock": clock,
        "seconds": {"ours": seconds[0], "peer": seconds[1]},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "floor": line.floor if size == "192x4" else None,
        "operations": {"ours": needed[0], "peer": needed[1]},
        "operations_ratio": needed[1] / needed[0],
        "matrix_gflops": rate,
        "share_of_limit": needed[0] / 1e9 / rate / statistics.median(seconds[0]),
        "peak_mib": [max(each["peak_mib"] for each in side) for side in told],
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    names = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    facts = {"processor": names.strip("\t :"), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    if device != "cpu":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"python": platform.python_version(), "device": device}


def main() -> None:
    """Measure the lines that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", choices=[*LINES, "all"], metavar="LINE", help=", ".join(LINES))
    parser.add_argument("--size", choices=list(SIZES), default="192x4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in LINES if "all" in options.lines else options.lines:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder) / "case", options.size, options.rounds, options.device)
        (options.out / f"{name}.{options.size}.{options.device}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(
            json.dumps({key: found[key] for key in ("line", "ratio", "operations_ratio", "share_of_limit")}), flush=True
        )


if __name__ == "__main__":
    main()

"""Write the table of docs/speed.md, between its markers, from results/benchmarks; no figure there is typed.

Usage: python benchmarks/table.py [--check]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "results/benchmarks", ROOT / "docs/speed.md"
MID_SIZE, OF_OPERATIONS = "512x8", 0.8  # there the floor is a share of the operations ratio
MATRIX = RESULTS / "evaluation/matrix.json"
BEGIN, END = "<!-- figures: begin (benchmarks/table.py) -->\n", "<!-- figures: end -->\n"
HEAD = (
    "| work, peer | model | ours, s | peer, s | ratio (range) | floor | operations ratio | share of the matrix rate |"
    " peak memory, MiB (peer) |\n|---|---|---|---|---|---|---|---|---|\n"
)


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    ours, peer = (statistics.median(found["seconds"][side]) for side in ("ours", "peer"))
    ratios = found["ratios"]
    least = found["floor"] if found["size"] != MID_SIZE else OF_OPERATIONS * found["operations_ratio"]
    floor = "" if least is None else f"{least:.3g} ({'met' if found['ratio'] >= least else 'missed'})"
    return (
        f"| {found['what']} | {found['size']}, {found['machine']['device']} | {ours:.3f} | {peer:.3f} |"
        f" {found['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {floor} | {found['operations_ratio']:.2f} |"
        f" {found['share_of_limit']:.0%} | {found['peak_mib'][0]:.0f} ({found['peak_mib'][1]:.0f}) |\n"
    )


def matrix() -> str:
    """The sentences on a whole matrix of evaluation, if it was measured."""
    if not MATRIX.is_file():
        return ""
    found = json.loads(MATRIX.read_text())
    styles = []
    for style, seconds in found["seconds_of_two_cores"].items():
        clock = statistics.median(each["clock"] for each in found["rounds"][style])
        styles.append(f"`{style}` {seconds:.0f} s of two cores ({clock:.0f} s by the clock)")
    worst, bound = max(found["seconds_of_two_cores"].values()), found["bound"]
    asked = "" if bound is None else f"; asked: at most {bound:g} ({'met' if worst <= bound else 'missed'})"
    machine = found["machine"]
    return (
        f"\nA matrix of evaluation, {found['what']} in one style: {', '.join(styles)}{asked}. Checkpoints:"
        f" {found['checkpoints']}. Load {machine['load']} on {machine['cores']} cores. `{found['command']}`\n"
    )


def block() -> str:
    """The whole table and what it was measured on."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    machines = sorted({f"{each['machine']['processor']}, {each['machine']['cores']} cores" for each in found})
    versions = sorted({f"{name} {number}" for each in found for name, number in each["versions"]["peer"].items()})
    notes = f"\nMachine: {'; '.join(machines)}. Peers: {', '.join(versions)}.\n"
    return HEAD + "".join(map(row, found)) + notes + matrix()


def main() -> int:
    """Write, or with --check say whether the page is stale."""
    old = PAGE.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has lost its markers. Fix: put {BEGIN.strip()} and {END.strip()} back.")
    new = before + begin + block() + end + after
    if "--check" in sys.argv:
        return int(old != new)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

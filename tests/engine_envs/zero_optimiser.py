"""The optimiser under ZeRO-2 against the one of a single process, by two processes on CPU, in float32 and in bfloat16.

Usage: zero_optimiser.py, in an environment with deepspeed, with the project in PYTHONPATH.
"""

import os
import socket
import sys
import traceback
from collections.abc import Sequence

import deepspeed  # noqa: F401 - once, before the forks
import torch
from torch import Tensor, nn

from cpt_rft.config.engine import LocalConfig
from cpt_rft.engines.local.optimise import Optimiser
from cpt_rft.engines.local.zero import ShardedOptimiser, Sharing
from tests.helpers.engine import sft

STEPS, SIZE = 6, 2


class Towers(nn.Module):
    """Two towers of which a micro-batch may use one, as one without pictures does, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures, self.words, self.head = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor, pictures: bool) -> Tensor:
        seen = self.words(x) + self.pictures(x) if pictures else self.words(x)
        out: Tensor = (self.head(seen.tanh()) * self.frozen).float()
        return out


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers()


def losses(model: Towers, step: int) -> list[Tensor]:
    """The micro-batches of a step, all of them; every other one has pictures."""
    dtype = model.head.weight.dtype
    rows = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
    return [(model(row, number % 2 == 0) - number).square().mean() / 4 for number, row in enumerate(rows)]


def own(items: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
    """Three for one process and one for the other."""
    return items[:3] if rank == 0 else items[3:]


def main(dtype: torch.dtype) -> None:
    """One process's part of all checks."""
    method = sft(lr=0.05, max_grad_norm=0.3, weight_decay=0.1)
    name = str(dtype).removeprefix("torch.")
    team = Sharing(
        LocalConfig(name="local", processes=SIZE, deepspeed="zero2", device="cpu", dtype=name),  # type: ignore[arg-type]
        method,
    )
    start = towers()
    exact = {name: weight.detach().clone() for name, weight in start.named_parameters() if weight.requires_grad}
    shared = ShardedOptimiser(start, method, STEPS, dtype=dtype, max_skipped=3, team=team)
    alone_model = towers()
    alone = Optimiser(alone_model, method, STEPS, dtype=dtype, max_skipped=3)

    def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
        assert not team.leads or all(torch.equal(one[name], two[name]) for name in two), "other bits"

    def train(step: int) -> None:
        for loss in own(losses(start, step), team.rank):
            shared.backward(loss)
        team.told("all exchange something, whatever each has handed over")
        assert shared.step(step, 1.0).moved

    same(shared.named_weights(), exact)  # the float32 weights that bfloat16 would have rounded
    for step in range(3):
        train(step)
        for loss in losses(alone_model, step):
            alone.backward(loss)
        expected = alone.step(step, 1.0)
        assert expected.moved
    whole = shared.named_weights()
    if team.leads:
        gap = sum(float((whole[name] - weight).square().sum()) for name, weight in alone.named_weights().items())
        moved = sum(float((whole[name] - exact[name]).square().sum()) for name in exact)
        print(f"{name}: relative difference of the update {(gap / moved) ** 0.5:.1e}", flush=True)
        assert gap**0.5 <= (1e-4 if dtype == torch.float32 else 5e-2) * moved**0.5
    same(
        {name: weight.float() for name, weight in start.named_parameters() if weight.requires_grad},
        rounded(whole, dtype),
    )

    for loss in own(losses(start, 3), team.rank):
        shared.backward(loss)
    assert not shared.step(3, float("nan")).moved  # its gradient is finite
    if team.rank == 1:
        shared.backward(losses(start, 3)[0] * float("inf"))
    assert not shared.step(3, 1.0).moved
    assert shared.skipped == 2
    same(shared.named_weights(), whole)

    state = team.told(shared.state())  # only the process that leads had it
    train(3)
    after = shared.named_weights()
    shared.restore(state)
    same(shared.named_weights(), whole)
    train(3)
    same(shared.named_weights(), after)
    team.leave()


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype).float() for name, weight in weights.items()}


def fork(dtype: torch.dtype) -> list[int]:
    """Two processes of their own; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(SIZE):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
            try:
                main(dtype)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


if __name__ == "__main__":
    failed = [
        os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for dtype in (torch.float32, torch.bfloat16)
        for child in fork(dtype)
    ]
    sys.exit(any(failed))

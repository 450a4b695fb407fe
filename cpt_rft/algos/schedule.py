"""How much of a demonstration is shown, by step."""

import math


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 to ``end`` at step ``steps`` along half a cosine; ``end`` afterwards.

    Source: ZeroYuHuang/prefix_rft@5f5d2a1 recipe/prefix_rft/scheduler/global_step.py CosineDecayController.

    >>> [round(cosine(step, 4, 1.0, 0.0), 3) for step in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    """
    if step >= steps:
        return end
    return end + 0.5 * (1.0 + math.cos(math.pi * step / steps)) * (start - end)

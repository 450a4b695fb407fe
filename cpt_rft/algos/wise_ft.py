"""WiSE-FT: the average of the weights before and after a stage."""

from collections.abc import Mapping

from torch import Tensor

from cpt_rft.errors import CheckpointError


def averaged_weights(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """``(1 - share) * before + share * after``; a share of 0 or 1 gives one of the two, bit for bit.

    Source: WiSE-FT, arXiv 2109.01903 section 3, equation 1; mlfoundations/wise-ft@58b7a4b src/wise_ft.py _merge
    (without Fisher weights). Differs from: averaged in float32 whatever the type; counters and other whole numbers are
    taken from ``after``.

    Raises:
        CheckpointError: The two do not hold the same names and shapes.
    """
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name in {*before, *after} if shapes[0].get(name) != shapes[1].get(name))
        raise CheckpointError(
            f"the weights before and after differ in {len(wrong)} tensors, first {wrong[0]!r}.",
            "average checkpoints of one model.",
        )
    if share in (0.0, 1.0):
        return {name: value.clone() for name, value in (after if share else before).items()}
    return {
        name: ((1.0 - share) * before[name].float() + share * value.float()).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in after.items()
    }

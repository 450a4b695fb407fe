"""Learning without forgetting: answer the new inputs as the previous model did."""

from torch import Tensor


def distillation_loss(logits_NV: Tensor, previous_NV: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Cross-entropy (N,) of the softened policy under the softened previous model; least, not zero, at equality.

    Source: LwF, arXiv 1606.09282 equations 2 to 4; GMvandeVen/continual-learning@e6d795a
    models/utils/loss_functions.py loss_fn_kd (norm false: no factor of the squared temperature). Differs from: one
    loss a position of the answer, over the vocabulary, where the source has one an image, over classes.
    """
    previous_NV = (previous_NV.detach().float() / temperature).softmax(-1)
    return -(previous_NV * (logits_NV.float() / temperature).log_softmax(-1)).sum(-1)

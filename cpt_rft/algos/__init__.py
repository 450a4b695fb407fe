"""The mathematics of training: pure functions on tensors, one file an algorithm, nothing but torch.

Axes in names: ``_P`` prompts, ``_G`` completions a prompt, ``_T`` tokens of a completion, ``_V`` vocabulary, ``_N``
tokens in one flat row. Masks are 1 on real tokens. Every loss divides by a token count of the caller's choice, so that
the micro-batches of one optimiser step add up to the loss of the whole batch.
"""

"""The mathematics of training: pure functions on tensors, one file an algorithm, nothing but torch.

Axes in names: ``_P`` prompts, ``_G`` completions a prompt, ``_S`` sequences (the completions of all prompts), ``_T``
tokens of a completion, ``_V`` vocabulary, ``_N`` tokens in one flat row. Masks are 1 on real tokens, and what stands
on padding never counts. Every loss divides by counts of the caller's choice, so that the micro-batches of one
optimiser step add up to the loss of the whole batch. ``docs/algorithms.md`` lists equations, sources and checks.
"""

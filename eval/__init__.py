"""The shared harness: generate, score, measure forgetting, report. It does not know who trained a checkpoint."""

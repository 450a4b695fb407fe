"""A study as chains of stages: plan, run, resume, lineage."""

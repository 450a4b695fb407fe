"""LLaMA-Factory as an engine: its own files, its own command, its own environment."""

RELEASE = "0.9.5"
COMMIT = "7af909522a951e3ad9f022ea6f88b6755257eaa5"

"""Does reinforcement fine-tuning forget less than supervised fine-tuning? The library."""

__version__ = "0.1.0"

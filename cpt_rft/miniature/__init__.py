"""The miniature: a drawn world, its seven tasks, its general abilities, and the tiny base model."""

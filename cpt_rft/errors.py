"""Errors a user can cause and mend. Everything else is a bug and shows its traceback."""

from typing import Any


class UserError(Exception):
    """A problem with one clear sentence and one fix; the command line prints both and exits with 2.

    Args:
        problem: What is wrong, naming the file, the row or the key.
        fix: What to do about it, as an instruction.
    """

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem} Fix: {fix}")
        self.problem = problem
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:  # an error of a worker process reaches the command line as it is
        return type(self), (self.problem, self.fix)


def install_extra(extra: str) -> str:
    """The fix where an optional part is not installed: what works in a clone, since no package index has the project.

    >>> print(install_extra("math"))
    run in the folder of this project: pip install -e ".[math]"
    """
    return f'run in the folder of this project: pip install -e ".[{extra}]"'


class ConfigError(UserError):
    """A key, a value or a file of the configuration is wrong."""


class DataError(UserError):
    """A row, a picture or a data file cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or not the one its manifest describes."""


class StageError(UserError):
    """A stage cannot run here and now: another run holds the directory, or its identity differs."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss stays non-finite."""

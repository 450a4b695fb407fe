"""What the hub's libraries raise, as one sentence with the fix."""

from types import ModuleType
from typing import Any

from cpt_rft.errors import DataError, install_extra


def need_data_extra() -> tuple[ModuleType, ModuleType]:
    """The modules ``datasets`` and ``huggingface_hub``, imported when first needed: the base install lacks them.

    Raises:
        DataError: They are not installed.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"Real datasets need the package {error.name}.", install_extra("data")) from error
    return datasets, huggingface_hub


def explain(error: Exception, repo: str, revision: str | None) -> DataError | None:
    """The error as one for the user; none if it is not an error of the hub.

    Args:
        error: What a call of ``datasets`` or ``huggingface_hub`` raised.
        repo: The repository that it was about.
        revision: The commit, branch or tag that it was about; none for the newest.
    """
    datasets, huggingface_hub = need_data_extra()
    errors = huggingface_hub.errors
    endpoint = huggingface_hub.constants.ENDPOINT
    text = str(error)
    kinds: Any = {type(cause).__name__ for cause in _causes(error)}
    if "OfflineModeIsEnabled" in kinds or isinstance(error, errors.OfflineModeIsEnabled):
        return DataError(
            f"{repo} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it.",
            "unset HF_HUB_OFFLINE, or prepare where there is a network and copy HF_HOME and the data directory here",
        )
    if "GatedRepoError" in kinds or "gated dataset" in text:
        return DataError(
            f"{repo} is gated: its owner gives access on request.",
            f"ask for access at {endpoint}/datasets/{repo}, then log in with 'hf auth login' or set HF_TOKEN",
        )
    if "RevisionNotFoundError" in kinds:
        return DataError(f"{repo} has no revision {revision}.", "set 'revision' of the task to null or to a commit")
    if "RepositoryNotFoundError" in kinds or isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return DataError(
            f"There is no dataset {repo} at {endpoint}, or it is private.",
            "add its new name to 'repos' in the task's file, or log in with 'hf auth login' if it is private",
        )
    if "Dataset scripts are no longer supported" in text:
        return DataError(
            f"{repo} is read by a Python script of its own, which 'datasets' no longer runs.",
            "set 'repos' in the task's file to a copy of it in parquet",
        )
    if "BuilderConfig" in text and "not found" in text:
        return DataError(f"{repo}: {text}.", "set 'config' of the task to one of these")
    if kinds & {"DataFilesNotFoundError", "EmptyDatasetError"}:
        return DataError(f"{repo} holds no data files ({text}).", "set 'revision' or 'repos' of the task")
    if "No space left" in text:
        return DataError("The disk is full.", "free some space or set HF_HOME to a larger disk, then prepare again")
    if isinstance(error, OSError) or kinds & {"HfHubHTTPError", "LocalEntryNotFoundError"}:
        return DataError(
            f"{repo} could not be fetched from {endpoint} ({text.splitlines()[0] if text else type(error).__name__}).",
            "give the same command again later, or set HF_ENDPOINT to a mirror; complete files are kept",
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain

"""Room on disk, checked before a download begins."""

import shutil
from pathlib import Path

from cpt_rft.errors import DataError

SPARE_BYTES = 2**30


def require_space(place: Path, size: int, what: str) -> None:
    """Raise unless ``size`` bytes and a little more are free where ``place`` is or will be.

    Raises:
        DataError: They are not.
    """
    existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size + SPARE_BYTES:
        raise DataError(
            f"{what} needs {size / 1e9:.1f} GB more in {place}, and {free / 1e9:.1f} GB are free there.",
            "free some space, or set HF_HOME (files of the hub) or the data directory to a larger disk",
        )

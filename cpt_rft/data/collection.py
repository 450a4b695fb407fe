"""Pictures in a folder or in a zip archive, read one at a time and never unpacked."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cpt_rft.data.picture import PictureError
from cpt_rft.data.reasons import Reason
from cpt_rft.errors import DataError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_BYTES = 256 * 2**20
"""No picture is larger: an archive can claim any size."""
# RuntimeError: encrypted, compressed in an unknown way, or a link to itself.
_BROKEN = (OSError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class Collection:
    """Relative names of pictures, and their bytes.

    Args:
        path: A directory, or a zip file.

    Raises:
        DataError: There is neither at ``path``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            self.root = path.resolve()
            return
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} is neither a folder nor a zip archive ({error}).", "give the folder, or delete and fetch again"
            ) from error

    def names(self) -> Iterator[str]:
        """Relative names with forward slashes, sorted; other files than pictures are left out."""
        if self._archive is not None:
            names = (info.filename for info in self._archive.infolist() if not info.is_dir())
        else:
            names = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir())
        yield from sorted(name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES)

    def read(self, name: str) -> bytes:
        """The bytes of a picture.

        Raises:
            PictureError: It is not there, is broken or encrypted, is too large, or a link leads out of the folder.
        """
        try:
            if self._archive is not None:
                info = self._archive.getinfo(name)
                if info.file_size > MAX_BYTES:
                    raise PictureError(Reason.PICTURE_BOMB, f"{name} has {info.file_size} bytes.")
                return self._archive.read(info)
            path = (self.path / name).resolve(strict=True)
            if not path.is_relative_to(self.root):
                raise PictureError(Reason.UNSAFE_NAME, f"{name} is a link that leads out of the folder.")
            if path.stat().st_size > MAX_BYTES:
                raise PictureError(Reason.PICTURE_BOMB, f"{name} has {path.stat().st_size} bytes.")
            return path.read_bytes()
        except _BROKEN as error:
            raise PictureError(
                Reason.PICTURE_UNREADABLE, f"{name} cannot be read ({type(error).__name__}: {error})."
            ) from error

"""Tables of the Hugging Face hub: resolved once, locked, downloaded with patience, streamed from disk.

``datasets`` finds the files of a configuration, ``huggingface_hub`` downloads them into its own cache (HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE mean what they always mean). Rows are then read from those files one at a time, so
that neither memory nor a second copy on disk grows with the set. A download that is killed goes on with the first
file that is not complete.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from cpt_rft.data.hub_errors import explain, need_data_extra
from cpt_rft.data.retry import PATIENCE, retrying
from cpt_rft.data.site import fetch_archive
from cpt_rft.data.source import Source, SourceFile
from cpt_rft.data.space import require_space
from cpt_rft.errors import DataError
from cpt_rft.files import read_json, sha256_file, write_json_atomic

T = TypeVar("T")
_PATHS_A_REQUEST = 500
_BATCH = 16


class Table(NamedTuple):
    """One part of a source: a split of a configuration."""

    part: str
    config: str | None
    split: str


class _Listed(NamedTuple):
    part: str
    name: str
    size: int
    sha256: str | None  # None: not an LFS object, so the hub does not state it


def fetch_tables(repos: Sequence[str], revision: str | None, tables: Sequence[Table], lock: Path) -> Source:
    """Resolve and download the parquet files of some splits; with a complete lock, without any network.

    Args:
        repos: The names to try, in order.
        revision: A commit, branch or tag; none for the newest.
        tables: Which splits of which configurations, and what each is called in the source.
        lock: A JSON file that remembers what was resolved; later calls use it as it is.

    Raises:
        DataError: With what is wrong and what to do.
    """
    asked = {"repos": list(repos), "revision": revision, "tables": [list(table) for table in tables]}

    def list_files(repo: str, sha: str) -> tuple[list[_Listed], dict[str, int]]:
        listed: list[_Listed] = []
        card_rows: dict[str, int] = {}
        for config in dict.fromkeys(table.config for table in tables):
            splits = [table for table in tables if table.config == config]
            files, counts = _parquet_files(repo, sha, config, splits)
            listed += _with_sizes(repo, sha, files)
            card_rows |= counts
        return listed, card_rows

    known = _resolved(asked, repos, revision, list_files, lock)
    listed = [_Listed(**file) for file in known["files"]]
    repo, sha = known["repo"], known["revision"]
    _check_space(repo, sha, listed)
    files = tuple(_download(repo, sha, file, trusted=known["complete"]) for file in listed)
    if not known["complete"]:
        known["files"] = [{"part": f.part, "name": f.name, "size": f.size, "sha256": f.sha256} for f in files]
        write_json_atomic(lock, known | {"complete": True})
    rows = {table.part: sum(_num_rows(file.path) for file in files if file.part == table.part) for table in tables}
    config = tables[0].config if len({table.config for table in tables}) == 1 else None
    return Source(repo, sha, config, files, rows, known["card_rows"], known["renamed_from"])


def fetch_files(
    repos: Sequence[str], revision: str | None, names: Mapping[str, str], lock: Path, directory: Path
) -> Source:
    """Resolve and download plain files of a repository, each a part of its own.

    They are large, so they are fetched like a site's archives: a killed download goes on within the file.

    Args:
        repos: The names to try, in order.
        revision: A commit, branch or tag; none for the newest.
        names: Path in the repository by part.
        lock: A JSON file that remembers what was resolved.
        directory: Where the files go.

    Raises:
        DataError: With what is wrong and what to do.
    """
    _, huggingface_hub = need_data_extra()
    asked = {"repos": list(repos), "revision": revision, "files": dict(names)}

    def list_files(repo: str, sha: str) -> tuple[list[_Listed], dict[str, int]]:
        return _with_sizes(repo, sha, [(part, name) for part, name in names.items()]), {}

    known = _resolved(asked, repos, revision, list_files, lock)
    listed = [_Listed(**file) for file in known["files"]]
    repo, sha = known["repo"], known["revision"]
    require_space(directory, sum(f.size for f in listed if not (directory / Path(f.name).name).is_file()), repo)
    files = []
    for file in listed:
        url = huggingface_hub.hf_hub_url(repo, file.name, revision=sha, repo_type="dataset")
        headers = huggingface_hub.utils.build_hf_headers()
        for _ in range(2):
            fetched = fetch_archive(url, directory, file.part, headers)
            if file.sha256 in (None, fetched.sha256):
                files.append(SourceFile(file.part, file.name, fetched.size, fetched.sha256, fetched.path))
                break
            fetched.path.unlink()
        else:
            raise _other_content(repo, file, fetched.sha256)
    return Source(repo, sha, None, tuple(files), {}, {}, known["renamed_from"])


def stream(files: Sequence[SourceFile], columns: Sequence[str], batch: int = _BATCH) -> Iterator[dict[str, Any]]:
    """The rows of parquet files as dictionaries of some columns, pictures as ``{"bytes", "path"}``.

    A column that the files lack is absent from the rows.

    Args:
        files: They have the same columns.
        columns: What to read.
        batch: Rows in memory as Python objects, pictures included.

    Raises:
        DataError: A file does not read.
    """
    datasets, _ = need_data_extra()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(files[0].path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files[0], error) from error
    known = datasets.Features.from_arrow_schema(schema)
    features = datasets.Features({name: _undecoded(datasets, known[name]) for name in columns if name in known})
    rows = datasets.load_dataset(
        "parquet",
        data_files={"rows": [str(file.path) for file in files]},
        split="rows",
        streaming=True,
        columns=list(features),
        features=features,
    )
    try:
        for table in rows.with_format("arrow").iter(batch_size=batch):
            yield from table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files[0], error) from error


def columns_of(files: Sequence[SourceFile]) -> list[str]:
    """The names of the columns of the first file."""
    import pyarrow.parquet as pq

    return list(pq.read_schema(files[0].path).names)


def _resolved(
    asked: dict[str, Any],
    repos: Sequence[str],
    revision: str | None,
    list_files: Callable[[str, str], tuple[list[_Listed], dict[str, int]]],
    lock: Path,
) -> dict[str, Any]:
    """What the lock says, or what the hub says now, which is then locked."""
    need_data_extra()
    known = read_json(lock)
    if known.get("asked") != asked:
        known = {"asked": asked, "complete": False} | _resolve(repos, revision, list_files)
        lock.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(lock, known)
    return known


def _resolve(
    repos: Sequence[str],
    revision: str | None,
    list_files: Callable[[str, str], tuple[list[_Listed], dict[str, int]]],
) -> dict[str, Any]:
    """The commit and the files of the first repository that exists."""
    _, huggingface_hub = need_data_extra()
    missing: list[DataError] = []
    for asked_name in repos:

        def info(name: str = asked_name) -> Any:
            return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=60.0)

        try:
            found = _patient(info, asked_name, revision)
        except DataError as error:
            if not isinstance(error.__cause__, huggingface_hub.errors.RepositoryNotFoundError):
                raise
            missing.append(error)
            continue
        listed, card_rows = list_files(found.id, found.sha)
        return {
            "repo": found.id,
            "renamed_from": asked_name if found.id != asked_name else None,
            "revision": found.sha,
            "files": [file._asdict() for file in listed],
            "card_rows": card_rows,
        }
    raise missing[0]


def _parquet_files(
    repo: str, sha: str, config: str | None, tables: Sequence[Table]
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(part, path in the repository) of every file, and the rows that the card states."""
    datasets, _ = need_data_extra()
    builder = _patient(lambda: datasets.load_dataset_builder(repo, name=config, revision=sha), repo, sha)
    data_files = builder.config.data_files or {}
    files: list[tuple[str, str]] = []
    card_rows: dict[str, int] = {}
    for table in tables:
        if table.split not in data_files:
            shown = f"{repo}, configuration {config}," if config else repo
            raise DataError(
                f"{shown} has no split {table.split!r}.", f"set 'splits' to some of {', '.join(map(str, data_files))}"
            )
        for url in data_files[table.split]:
            path = str(url).partition(f"@{sha}/")[2]
            if PurePosixPath(path).suffix != ".parquet":
                raise DataError(f"{repo} holds {path}, which is not parquet.", "set 'repos' to a parquet copy of it")
            files.append((table.part, path))
        stated = (builder.info.splits or {}).get(table.split)
        if stated is not None and stated.num_examples:
            card_rows[table.part] = int(stated.num_examples)
    return files, card_rows


def _with_sizes(repo: str, sha: str, files: Sequence[tuple[str, str]]) -> list[_Listed]:
    _, huggingface_hub = need_data_extra()
    api = huggingface_hub.HfApi()
    names = [name for _, name in files]
    infos: dict[str, Any] = {}
    for start in range(0, len(names), _PATHS_A_REQUEST):
        some = names[start : start + _PATHS_A_REQUEST]

        def paths_info(some: list[str] = some) -> Any:
            return api.get_paths_info(repo, some, revision=sha, repo_type="dataset")

        infos |= {info.path: info for info in _patient(paths_info, repo, sha)}
    for name in names:
        if name not in infos:
            raise DataError(f"{repo} at {sha[:12]} has no file {name}.", "set 'revision' to a commit that has it")
    return [
        _Listed(part, name, infos[name].size, infos[name].lfs.sha256 if infos[name].lfs else None)
        for part, name in files
    ]


def _check_space(repo: str, sha: str, listed: Sequence[_Listed]) -> None:
    """Refuse to begin a download that would fill the disk."""
    _, huggingface_hub = need_data_extra()
    missing = sum(file.size for file in listed if _cached(repo, sha, file.name) is None)
    if not missing:
        return
    place = Path(huggingface_hub.constants.HF_HUB_CACHE)
    require_space(place, missing, repo)


def _cached(repo: str, sha: str, name: str) -> Path | None:
    _, huggingface_hub = need_data_extra()
    path = huggingface_hub.try_to_load_from_cache(repo, name, revision=sha, repo_type="dataset")
    return Path(path) if isinstance(path, str) else None


def _download(repo: str, sha: str, file: _Listed, *, trusted: bool) -> SourceFile:
    """One file on disk with its size and hash checked; a file with a wrong hash is fetched once more."""
    _, huggingface_hub = need_data_extra()
    path = _cached(repo, sha, file.name)
    if trusted and path is not None and path.stat().st_size == file.size and file.sha256:
        return SourceFile(file.part, file.name, file.size, file.sha256, path)
    for force in (path is not None and path.stat().st_size != file.size, True):

        def download(force: bool = force) -> str:
            return str(
                huggingface_hub.hf_hub_download(
                    repo, file.name, revision=sha, repo_type="dataset", force_download=force
                )
            )

        path = Path(_patient(download, repo, sha))
        found = sha256_file(path)
        if file.sha256 in (None, found):
            return SourceFile(file.part, file.name, path.stat().st_size, found, path)
    raise _other_content(repo, file, found)


def _other_content(repo: str, file: _Listed, found: str) -> DataError:
    return DataError(
        f"{file.name} of {repo} came twice with another sha256 ({found[:12]}) than the hub states ({file.sha256}).",
        "try again later or from another mirror (HF_ENDPOINT); if the repository is broken, set 'revision'",
    )


def _patient(call: Callable[[], T], repo: str, revision: str | None) -> T:
    try:
        return retrying(call, PATIENCE)
    except DataError:
        raise
    except Exception as error:
        explained = explain(error, repo, revision)
        if explained is None:
            raise
        raise explained from error


def _undecoded(datasets: Any, feature: Any) -> Any:
    """The same feature with pictures left as they are stored."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(datasets, feature.feature))
    return feature


def _num_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def _unreadable(file: SourceFile, error: Exception) -> DataError:
    return DataError(f"{file.path} is not a readable parquet file ({error}).", "delete it and prepare again")

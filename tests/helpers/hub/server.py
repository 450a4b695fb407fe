"""The server: repositories, their files, and the routes, headers and errors that the clients rely on.

Routes and headers were measured with datasets 5.2.0 and huggingface_hub 2.4.0 against the real hub's protocol: the
commit in X-Repo-Commit, 404 with X-Error-Code for a file that is not there, large files behind a redirect to another
host, trees in pages, relative redirects for renamed repositories.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.helpers.hub.faults import Fault

LFS_SUFFIXES = {".parquet", ".zip", ".json"}


@dataclass
class Repo:
    """A dataset repository with one commit.

    Attributes:
        files: Content by path.
        renamed_to: Every route redirects to this name.
        gated: Files answer 403 without a token.
        private: Everything answers 401, as for a repository that does not exist.
        stated_sha256: What the tree says of a file instead of the truth.
    """

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    renamed_to: str | None = None
    gated: bool = False
    private: bool = False
    stated_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        """The commit: it changes with the content."""
        digest = hashlib.sha1(self.name.encode())
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """The tree entry of a file."""
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if PurePosixPath(path).suffix in LFS_SUFFIXES:
            sha256 = self.stated_sha256.get(path, hashlib.sha256(content).hexdigest())
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """The entries of a folder; none if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(self.files) if path.startswith(prefix)]
        if not below and folder:
            return None
        entries: dict[str, dict[str, Any]] = {}
        for path in below:
            first, slash, _ = path[len(prefix) :].partition("/")
            if slash:
                entries.setdefault(
                    prefix + first, {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
                )
            if not slash or recursive:
                entries[path] = self.entry(path)
        return list(entries.values())


class Hub:
    """A running hub; use it as a context manager.

    Attributes:
        repos: By name.
        site: Files of plain web sites, by path: they support ranges.
        faults: Tried in order at every request.
        requests: ``METHOD path [range]`` of every request so far.
        authorized: The path of every request that carried a token.
        page: Entries a page of a tree.
        ranges: Whether ranges are honoured.
    """

    def __init__(self, *repos: Repo) -> None:
        self.repos = {repo.name: repo for repo in repos}
        self.site: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.authorized: list[str] = []
        self.page = 1000
        self.ranges = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT should be."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, *repos: Repo) -> None:
        """Serve more repositories."""
        self.repos |= {repo.name: repo for repo in repos}

    def count(self, method: str, part: str) -> int:
        """How many requests with this method had this text in their path."""
        return sum(line.startswith(method + " ") and part in line for line in self.requests)

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.route()

    def route(self) -> None:
        """Answer one request: faults first, then the file routes, then the interface."""
        path = urlsplit(self.path).path
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {wanted}".strip())
        if "Authorization" in self.headers:
            self.hub.authorized.append(path)
        fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, self.path)), None)
        if fault is not None and fault.kind == "status":
            extra = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
            return self.send(fault.status, b"fault", extra)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "site":
            content = self.hub.site.get(path)
            etag = f'"{hashlib.sha1(content or b"").hexdigest()}"'
            return self.file(content, {"ETag": etag, "Accept-Ranges": "bytes"}, fault)
        if parts[0] == "lfs":
            content = self.hub.repos["/".join(parts[1:3])].files["/".join(parts[3:])]
            return self.file(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, fault)
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        if parts[0] != "datasets" or len(parts) < 3:
            return self.missing("RepoNotFound")
        name, rest = "/".join(parts[1:3]), parts[3:]
        repo = self.hub.repos.get(name)
        if repo is None or repo.private:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo.renamed_to is not None:
            return self.send(307, b"", {"Location": self.path.replace(name, repo.renamed_to)})
        if len(rest) > 1 and rest[1] not in ("main", repo.sha):
            return self.missing("RevisionNotFound")
        return self.interface(repo, rest) if api else self.resolve(repo, rest, fault)

    def resolve(self, repo: Repo, rest: list[str], fault: Fault | None) -> None:
        """``/datasets/NAME/resolve/REVISION/PATH``."""
        if repo.gated and "Authorization" not in self.headers:
            message = f"Access to dataset {repo.name} is restricted."
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        path = "/".join(rest[2:])
        if rest[0] != "resolve" or path not in repo.files:
            return self.missing("EntryNotFound", {"X-Repo-Commit": repo.sha})
        entry = repo.entry(path)
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
            headers["Location"] = f"http://localhost:{self.hub.port}/lfs/{repo.name}/{quote(path)}"
            return self.send(302, b"", headers)
        return self.file(repo.files[path], headers, fault)

    def interface(self, repo: Repo, rest: list[str]) -> None:
        """``/api/datasets/NAME[/revision|tree|paths-info/...]``."""
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            about = {"id": repo.name, "sha": repo.sha, "private": False, "gated": repo.gated, "siblings": siblings}
            return self.json(about | {"tags": [], "downloads": 0, "likes": 0})
        if rest[0] == "tree":
            query = parse_qs(urlsplit(self.path).query)
            entries = repo.tree("/".join(rest[2:]), query.get("recursive", ["false"])[0].lower() == "true")
            if entries is None:
                return self.missing("EntryNotFound")
            start = int(query.get("cursor", ["0"])[0])
            link = {}
            if start + self.hub.page < len(entries):
                address = f"{self.hub.endpoint}{urlsplit(self.path).path}"
                link = {
                    "Link": f'<{address}?recursive={query["recursive"][0]}&cursor={start + self.hub.page}>; rel="next"'
                }
            return self.json(entries[start : start + self.hub.page], link)
        if rest[0] == "paths-info":
            paths = parse_qs(self.body).get("paths", [])
            return self.json([repo.entry(path) for path in paths if path in repo.files])
        return self.missing("EntryNotFound")

    def file(self, content: bytes | None, headers: dict[str, str], fault: Fault | None) -> None:
        """A whole file or a range of it, with the fault of this request."""
        if content is None:
            return self.missing("EntryNotFound")
        status, start, end = 200, 0, len(content)
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, headers.get("ETag"))
        if wanted and same and self.hub.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
            if fault is not None and fault.kind == "misplaced":
                start = 0
            if start >= len(content):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        body = content[start:end]
        if fault is not None and fault.kind == "corrupt":
            body = body[: fault.at] + bytes([body[fault.at] ^ 1]) + body[fault.at + 1 :]
        self.send(status, body, headers, fault)

    def json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind == "cut":
            self.wfile.write(body[: fault.at])
            self.close_connection = True
            return
        pieces = [body[i : i + 4096] for i in range(0, len(body), 4096)] if fault and fault.kind == "slow" else [body]
        for piece in pieces:
            self.wfile.write(piece)
            if fault is not None:
                time.sleep(fault.pause_s)


def parquet_repo(
    name: str,
    configs: dict[str, dict[str, list[bytes]]],
    features: dict[str, str],
    num_rows: dict[str, dict[str, int]],
) -> Repo:
    """A repository of parquet files with the card that ``push_to_hub`` writes.

    Args:
        name: ``owner/name``.
        configs: Parquet shards by split by configuration.
        features: The ``features:`` block of the card by configuration, as YAML lines.
        num_rows: What the card says, by configuration and split.
    """
    files: dict[str, bytes] = {}
    card = ["---", "license: mit", "dataset_info:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", *features[config].splitlines(), "  splits:"]
        card += [f"  - name: {s}\n    num_bytes: 1\n    num_examples: {num_rows[config][s]}" for s in splits]
    card += ["configs:"]
    for config, splits in configs.items():
        folder = "data" if config == "default" else config
        card += [f"- config_name: {config}", "  data_files:"]
        for split, shards in splits.items():
            card += [f"  - split: {split}\n    path: {folder}/{split}-*"]
            for number, shard in enumerate(shards):
                files[f"{folder}/{split}-{number:05d}-of-{len(shards):05d}.parquet"] = shard
    files["README.md"] = "\n".join([*card, "---", f"# {name}", ""]).encode()
    return Repo(name, files)

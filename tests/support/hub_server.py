"""A hub of dataset repositories on 127.0.0.1: what `huggingface_hub` uses to push, pull and read.

Files are kept in memory, large ones by their hash, as the hub does; a test can let it fail.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LARGE = 1_000
"""Files of more bytes are stored by their hash."""


@dataclass
class Repository:
    """Its files, and whether others can see them."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        """Of the newest commit."""
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what was asked of it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    """Hashes of the large files that were sent."""
    downloads: list[tuple[str, str]] = field(default_factory=list)
    """Names of the files that were fetched, and the range asked for."""
    fails_after: int | None = None
    """So many large files are taken; then the server refuses."""


def _is_large(name: str, size: int) -> bool:
    return size > LARGE or name.endswith(".parquet")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, code: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def repository(self, name: str) -> Repository | None:
        """The one of this name, if whoever asks may see it."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.headers.get("Authorization")):
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def do_POST(self) -> None:
        """Create, ask how to upload, commit, look up."""
        path, body = urllib.parse.unquote(self.path.partition("?")[0]), self.body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            if name in self.hub.repositories:
                return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            return self.answer(200, {"url": f"{self.hub.url}/datasets/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/datasets/(.+)\.git/info/lfs/objects/batch", path):
            objects = [self.action(o) for o in json.loads(body)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(preupload|commit|paths-info)/.+", path)
        repository = self.repository(found[1]) if found else self.answer(404)
        if not found or repository is None:
            return None
        if found[2] == "preupload":
            files = [self.mode(repository, entry) for entry in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if found[2] == "commit":
            return self.commit(found[1], repository, body)
        names = json.loads(body)["paths"] if body[:1] == b"{" else _form(body)
        return self.answer(200, [e for n in names for e in self.entry(repository, n.strip("/"))])

    def action(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.objects:
            return asked
        upload = {"href": f"{self.hub.url}/objects/{asked['oid']}"}
        return {**asked, "actions": {"upload": upload}}

    def mode(self, repository: Repository, entry: dict[str, Any]) -> dict[str, Any]:
        large = _is_large(entry["path"], entry["size"])
        there = repository.files.get(entry["path"])
        oid = None if there is None else _oid(entry["path"], there)
        mode = "lfs" if large else "regular"
        return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, name: str, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
        repository.commits += 1
        url = f"{self.hub.url}/datasets/{name}/commit/{repository.sha}"
        self.answer(200, {"commitUrl": url, "commitOid": repository.sha})

    def do_PUT(self) -> None:
        """Take a large file, unless told to fail."""
        body = self.body()
        if self.hub.fails_after is not None and len(self.hub.uploads) >= self.hub.fails_after:
            return self.answer(403, {"error": "storage is full"})
        oid = hashlib.sha256(body).hexdigest()
        self.hub.uploads.append(oid)
        self.hub.objects[oid] = body
        return self.answer(200)

    def do_GET(self) -> None:
        """Facts of a repository, a listing, or a file."""
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "orgs": []})
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        asked = r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?"
        facts = re.fullmatch(asked, path)
        found = file or facts
        repository = self.repository(found[1]) if found else self.answer(404)
        if not found or repository is None:
            return None
        if file:
            return self.file(repository, file[2])
        assert facts
        if facts[2] == "tree":
            return self.tree(repository, facts[4])
        if facts[3] not in (None, "main", repository.sha):
            return self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(repository.files)]
        info = {"id": facts[1], "sha": repository.sha, "private": repository.private}
        return self.answer(200, {**info, "siblings": siblings})

    do_HEAD = do_GET

    def tree(self, repository: Repository, folder: str) -> None:
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = [name for name in sorted(repository.files) if name.startswith(prefix)]
        if prefix and not inside:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        names: list[str] = []
        recursive = "recursive=true" in self.path.lower()
        for name in inside:
            parts = name.removeprefix(prefix).split("/")
            ends = range(1, len(parts) + 1) if recursive else (1,)
            names += [prefix + "/".join(parts[:end]) for end in ends]
        names = list(dict.fromkeys(names))
        return self.answer(200, [e for name in names for e in self.entry(repository, name)])

    def entry(self, repository: Repository, name: str) -> list[dict[str, Any]]:
        if name in repository.files:
            data = repository.files[name]
            entry = {"type": "file", "path": name, "size": len(data), "oid": _oid(name, data)}
            if _is_large(name, len(data)):
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            return [entry]
        if any(other.startswith(f"{name}/") for other in repository.files):
            return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0}]
        return []

    def file(self, repository: Repository, name: str) -> None:
        data = repository.files.get(name)
        if data is None:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        asked = self.headers.get("Range") or ""
        if self.command == "GET":
            self.hub.downloads.append((name, asked))
        facts = {
            "ETag": f'"{_oid(name, data)}"',
            "X_Repo_Commit": repository.sha,
            "Accept_Ranges": "bytes",
        }
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            start, end = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
            if start >= len(data):
                return self.answer(416)
            where = f"bytes {start}-{end}/{len(data)}"
            return self.answer(206, data[start : end + 1], **facts, Content_Range=where)
        return self.answer(200, data, **facts)


def _oid(name: str, data: bytes) -> str:
    if _is_large(name, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _form(body: bytes) -> list[str]:
    return urllib.parse.parse_qs(body.decode()).get("paths", [])


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

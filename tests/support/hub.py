"""A model hub on 127.0.0.1: enough of its protocol that `huggingface_hub` fetches from folders."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "a" * 40


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root/OWNER/NAME` as repositories; gives the URL and the files that were fetched."""
    fetched: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def answer(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            """A listing, or a file."""
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
                folder = root / found[1]
                if not folder.is_dir():
                    self.answer(404, b"{}", X_Error_Code="RepoNotFound")
                    return
                names = sorted(
                    f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()
                )
                sizes = {name: (folder / name).stat().st_size for name in names}
                tree = [
                    {"type": "file", "path": name, "size": size, "oid": "b" * 40}
                    for name, size in sizes.items()
                ]
                info = {
                    "id": found[1],
                    "sha": COMMIT,
                    "siblings": [{"rfilename": name} for name in names],
                }
                listing = tree if (found[2] or "").startswith("/tree/") else info
                self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
            elif (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and (
                file := root / found[1] / found[2]
            ).is_file():
                body = file.read_bytes()
                if self.command == "GET":
                    fetched.append(found[2])
                etag = f'"{hashlib.md5(body).hexdigest()}"'
                self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()

"""A hub and a package index on 127.0.0.1, speaking as much of their protocols as clients use.

Large files (`.gguf`, `.safetensors`) are kept as LFS: asking for one redirects to a content
server, which is another origin and must never see the token.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    licence: str | None = None
    metadata: bool = True  # whether the listing tells sizes and hashes


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Behaviour:
    """What goes wrong, by file name."""

    drop_after: dict[str, list[int]] = field(default_factory=dict)  # bytes, one a request
    damaged: set[str] = field(default_factory=set)
    stall_after: dict[str, int] = field(default_factory=dict)
    ignores_range: bool = False


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.packages: dict[str, bytes] = {}  # wheels by file name
        self.behaviour = Behaviour()
        self.requests: list[Request] = []
        self.stalled = threading.Event()  # set once a stalled file has sent its part
        self.released = threading.Event()
        self._hub = self._serve()
        self._content = self._serve()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def content_url(self) -> str:
        return f"http://127.0.0.1:{self._content.server_address[1]}"

    @property
    def index_url(self) -> str:
        return f"{self.url}/simple"

    def content_requests(self, name: str) -> list[Request]:
        """The downloads of a large file's content."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/cdn/{name}")]

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.released.set()
        for server in (self._hub, self._content):
            server.shutdown()
            server.server_close()

    def _serve(self) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(
            Request(
                self.command, path, self.headers.get("Range"), self.headers.get("Authorization")
            )
        )
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "models", owner, name, "revision", *revision]:
                self._listing(f"{owner}/{name}", "/".join(revision))
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case [owner, name, "cdn", *file]:
                self._send(self.hub.repositories[f"{owner}/{name}"].files["/".join(file)], file[-1])
            case ["simple", package]:
                self._index(package)
            case ["wheels", wheel]:
                self._send(self.hub.packages[wheel], wheel)
            case _:
                self._error(404, "EntryNotFound")

    def _listing(self, name: str, revision: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        siblings: list[dict[str, object]] = []
        for file, content in repository.files.items():
            sibling: dict[str, object] = {"rfilename": file}
            if repository.metadata:
                sibling |= {"size": len(content), "blobId": "0" * 40}
                if _is_large(file):
                    digest = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = {"id": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        if repository.licence:
            body["cardData"] = {"license": repository.licence}
        self._reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        if repository.gated and self.headers.get("Authorization") != "Bearer good":
            self._error(401, "GatedRepo")
            return
        if file not in repository.files:
            self._error(404, "EntryNotFound")
            return
        content = repository.files[file]
        headers = {"X-Repo-Commit": repository.commit}
        if not _is_large(file):
            self._send(content, file, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            return
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.content_url}/{name}/cdn/{file}",
        }
        self._reply(302, b"", headers)

    def _find(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
            return None
        if revision not in ("main", repository.commit):
            self._error(404, "RevisionNotFound")
            return None
        return repository

    def _index(self, package: str) -> None:
        names = [w for w in self.hub.packages if w.split("-")[0].replace("_", "-") == package]
        links = "".join(f'<a href="/wheels/{name}">{name}</a>' for name in names)
        body = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        self._reply(200 if names else 404, body, {"Content-Type": "text/html"})

    def _send(self, content: bytes, file: str, headers: dict[str, str] | None = None) -> None:
        behaviour = self.hub.behaviour
        if file in behaviour.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, status = 0, 200
        wanted = self.headers.get("Range")
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        if wanted and not behaviour.ignores_range:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if self.command == "GET" and behaviour.drop_after.get(file):
            self._reply(status, body, headers, stop_after=behaviour.drop_after[file].pop(0))
        elif self.command == "GET" and file in behaviour.stall_after:
            stop = behaviour.stall_after.pop(file)
            self._reply(status, body, headers, stop_after=stop, stall=True)
        else:
            self._reply(status, body, headers)

    def _error(self, status: int, code: str) -> None:
        self._reply(status, b"", {"X-Error-Code": code})

    def _reply(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        *,
        stop_after: int | None = None,
        stall: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if stop_after is None else body[:stop_after])
        self.wfile.flush()
        if stall:
            self.hub.stalled.set()
            self.hub.released.wait(timeout=60)
        if stop_after is not None:
            self.close_connection = True


def _is_large(file: str) -> bool:
    return file.endswith((".gguf", ".safetensors"))

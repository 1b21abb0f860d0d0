"""A server that speaks the part of the Hub's protocol that pushing and pulling need, and records what it is sent.

Large files go to another origin (localhost rather than 127.0.0.1), as on the Hub itself; tokens have no business there.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, OTHER_TOKEN = "hf_theownersecret", "hf_thestrangerssecret"
OWNERS = {TOKEN: "me", OTHER_TOKEN: "stranger"}
PART = 1 << 16  # bytes of a large file in one request


class Sent(NamedTuple):
    """A body, or as much of it as there was before the connection was cut."""

    what: str  # a file's hash and part, or its path
    start: int
    count: int
    whole: bool


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        self.commits[sha := hashlib.sha1(repr((branch, len(self.commits))).encode()).hexdigest()] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"no revision {revision}")
        return sha, self.commits[sha]


class Refused(Exception):
    """An answer with a status, the Hub's code for it and a message."""


class Hub:
    """The server, on a port of its own until `close`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.uploads: list[Sent] = []
        self.downloads: list[Sent] = []
        self.requests: list[str] = []
        self.leaked: list[str] = []  # requests to the other origin that had a token
        self.listing: Callable[[list[dict[str, Any]]], Any] = lambda listed: listed  # a test may change it
        self.cut_upload: tuple[int, int] | None = None  # once: in this part, after so many bytes
        self.cut_download: int | None = None  # once: after so many bytes
        self.refuse: dict[str, tuple[int, str]] = {}  # status and message by what a path begins with
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repository].at(revision)[1]


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".pt"))


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.headers["Host"].startswith("localhost") and token:
            self.hub.leaked.append(path)
        self.body = b"" if self.command == "PUT" else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for start, (status, message) in self.hub.refuse.items():
                if path.startswith(start):
                    raise Refused(status, "", message)
            for method, pattern, answer in ROUTES:
                if method in (self.command, "GET" if self.command == "HEAD" else "") and (
                    match := re.fullmatch(pattern, path)
                ):
                    answer(self, OWNERS.get(token), parse_qs(url.query), *match.groups())
                    return
            raise Refused(404, "", f"there is no {path}")
        except Refused as refused:
            status, code, message = refused.args
            self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    # -- bodies

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        """Ends the connection in the middle of a body."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- repositories

    def _repository(self, name: str, user: str | None, *, write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        owner = name.partition("/")[0]
        if found is None or (found.private and user != owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refused(403, "", f"you may not write to {name}")
        return found

    def create(self, user: str | None, query: Any) -> None:
        wanted = json.loads(self.body)
        if user is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if wanted["organization"] != user:
            raise Refused(403, "", f"you may not write to {wanted['organization']}")
        name = f"{user}/{wanted['name']}"
        if name in self.hub.repositories:
            self._json({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}, 409)
            return
        made = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[name] = made
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def validate(self, user: str | None, query: Any) -> None:
        text = json.loads(self.body)["content"]
        wrong = [{"message": '"license" must be one of the list'}] if "license: mine" in text else []
        self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def about(self, user: str | None, query: Any, name: str, revision: str | None) -> None:
        found = self._repository(name, user)
        sha, files = found.at(revision or "main")
        listed = [{"rfilename": path} for path in files]
        self._json({"id": name, "modelId": name, "sha": sha, "private": found.private, "siblings": listed, "tags": []})

    def branch(self, user: str | None, query: Any, name: str, branch: str) -> None:
        found = self._repository(name, user, write=True)
        if branch in found.branches:
            self._json({"error": "exists"}, 409)
            return
        found.branches[branch] = found.branches["main"]
        self._json({})

    def tree(self, user: str | None, query: Any, name: str, revision: str, folder: str | None) -> None:
        _, files = self._repository(name, user).at(revision)
        prefix = f"{folder}/" if folder else ""
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if not inside:
            raise Refused(404, "EntryNotFound", f"no folder {folder}")
        listed: list[dict[str, Any]] = []
        for path, data in sorted(inside.items()):
            if not deep and "/" in path[len(prefix) :]:
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            listed.append(entry)
        self._json(self.hub.listing(listed))

    # -- pushing

    def preupload(self, user: str | None, query: Any, name: str, revision: str) -> None:
        wanted = json.loads(self.body)["files"]
        _, files = self._repository(name, user, write=True).at(revision)

        def known(path: str) -> str | None:
            if path not in files:
                return None
            return hashlib.sha256(files[path]).hexdigest() if is_large(path) else git_hash(files[path])

        answers = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if is_large(each["path"]) else "regular",
                "shouldIgnore": False,
                "oid": known(each["path"]),
            }
            for each in wanted
        ]
        self._json({"files": answers})

    def batch(self, user: str | None, query: Any, name: str) -> None:
        wanted = json.loads(self.body)["objects"]
        self._repository(name, user, write=True)
        elsewhere = f"http://localhost:{self.hub.port}"
        answers = []
        for each in wanted:
            oid, size = each["oid"], each["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                urls = {f"{n + 1:05}": f"{elsewhere}/large/{oid}/{n}?signature=s3cr3t" for n in range(-(-size // PART))}
                href = f"{elsewhere}/large/{oid}/done"
                answer["actions"] = {"upload": {"href": href, "header": {"chunk_size": str(PART), **urls}}}
            answers.append(answer)
        self._json({"transfer": "multipart", "objects": answers})

    def part(self, user: str | None, query: Any, oid: str, number: str) -> None:
        n, size = int(number), int(self.headers["Content-Length"])
        if self.hub.cut_upload is not None and self.hub.cut_upload[0] == n:
            count, self.hub.cut_upload = self.hub.cut_upload[1], None
            self.rfile.read(count)
            self.hub.uploads.append(Sent(f"{oid}/{n}", n * PART, count, whole=False))
            self._cut()
            return
        self.hub.parts[oid, n] = self.rfile.read(size)
        self.hub.uploads.append(Sent(f"{oid}/{n}", n * PART, size, whole=True))
        self.send_response(200)
        self.send_header("ETag", f'"{n}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def done(self, user: str | None, query: Any, oid: str) -> None:
        data = b"".join(self.hub.parts[oid, part["partNumber"] - 1] for part in json.loads(self.body)["parts"])
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self._json({})

    def commit(self, user: str | None, query: Any, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        found = self._repository(name, user, write=True)
        files = dict(found.at(revision)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = found.commit(revision, files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    # -- pulling

    def resolve(self, user: str | None, query: Any, name: str, revision: str, path: str) -> None:
        sha, files = self._repository(name, user).at(revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"no file {path}")
        data = files[path]
        if is_large(path):
            oid = hashlib.sha256(data).hexdigest()
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.hub.port}/cdn/{oid}?signature=s3cr3t")
            self.send_header("X-Linked-Etag", f'"{oid}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Repo-Commit", sha)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(path, data, {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": sha})

    def stored(self, user: str | None, query: Any, oid: str) -> None:
        found = (
            data
            for each in self.hub.repositories.values()
            for files in each.commits.values()
            for data in files.values()
        )
        self._send(oid, next(data for data in found if hashlib.sha256(data).hexdigest() == oid), {"ETag": f'"{oid}"'})

    def _send(self, what: str, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        body = data[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_download is not None and len(body) > self.hub.cut_download:
            count, self.hub.cut_download = self.hub.cut_download, None
            self.wfile.write(body[:count])
            self.hub.downloads.append(Sent(what, start, count, whole=False))
            self._cut()
            return
        self.wfile.write(body)
        self.hub.downloads.append(Sent(what, start, len(body), whole=True))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?", Handler.about),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(\w+)/(\d+)", Handler.part),
    ("POST", r"/large/(\w+)/done", Handler.done),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", r"/cdn/(\w+)", Handler.stored),
]

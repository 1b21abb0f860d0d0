"""A small HTTP server for people who look at runs: one page that is made when asked for, and files of a shown folder.

It answers GET and HEAD, one range of a file at a time, and asks browsers to check with it before they show a copy. A
page of another site can neither read its answers nor load them as scripts or pictures. On the loopback it answers only
to names of the loopback, so that no other site's name can be made to lead here.
"""

import ipaddress
import logging
import re
import socket
import socketserver
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from sae_dist.config import UserError
from sae_dist.service.shown_folder import ShownFile, ShownFolder
from sae_dist.storage import StorageError

logger = logging.getLogger(__name__)

AT_ONCE = 1 << 20  # bytes of a file in memory
IDLE_S = 60.0  # after which a connection without a request is closed
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".parquet": "application/vnd.apache.parquet",
}
OTHER_TYPE = "application/octet-stream"
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Made(NamedTuple):
    """An answer that is no file."""

    status: HTTPStatus
    body: bytes
    kind: str  # its content type


class WebServer(ThreadingHTTPServer):
    """Listens once it is made; `serve_forever` answers, a thread a connection."""

    daemon_threads = True  # the process ends without waiting for those who look on

    def __init__(
        self,
        host: str,
        port: int,
        *,
        folder: ShownFolder,
        page: Callable[[], str],
        beside: Mapping[str, bytes],
        made: Callable[[Sequence[str], str], Made | None],
    ) -> None:
        """`page` makes the page at /, `beside` are files that it loads.

        `made` gives answers to paths, in parts, and what is asked after `?`; None where a file of the folder is meant.
        UserError: nobody can listen there.
        """
        self.folder, self.page, self.beside, self.made = folder, page, beside, made
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address[:2], _Handler)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise UserError(
                f"port={port} at host={host} cannot be had ({error.strerror}); choose another port, 0 for a free one, "
                "or an address of this machine"
            ) from None

    @property
    def is_private(self) -> bool:
        """Whether only this machine can ask."""
        return ipaddress.ip_address(self.server_address[0]).is_loopback  # pyright: ignore[reportArgumentType]

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Without http.server's question for the machine's name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        logger.exception("a request from %s was not answered", client_address[0])


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: WebServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S

    def version_string(self) -> str:
        return "sae-dist"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks again every few seconds."""

    def do_GET(self) -> None:
        try:
            self._answer()
        except (ConnectionError, TimeoutError):  # nobody reads on
            self.close_connection = True

    do_HEAD = do_GET

    def _answer(self) -> None:
        if self.server.is_private and not is_loopback_name(self.headers.get("Host", "")):
            self._say(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this server answers to localhost and 127.0.0.1 only; start it with host= to be reached by other names",
            )
            return
        path, _, asked = self.path.partition("#")[0].partition("?")
        parts = [unquote(part, errors="surrogateescape") for part in path.split("/")[1:]]
        if path == "/":
            self._page()
        elif len(parts) == 1 and parts[0] in self.server.beside:
            self._send(HTTPStatus.OK, self.server.beside[parts[0]], content_type(parts[0]))
        elif parts[-1] in ("pages", "report", "features", "labels"):  # relative links need the slash
            self._send(HTTPStatus.MOVED_PERMANENTLY, b"", TYPES[".txt"], {"Location": f"{quote(parts[-1])}/"})
        else:
            self._below(parts, asked)

    def _page(self) -> None:
        try:
            page = self.server.page()
        except StorageError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return
        self._send(HTTPStatus.OK, page.encode(errors="replace"), TYPES[".html"], {"Cache-Control": "no-store"})

    def _below(self, parts: Sequence[str], asked: str) -> None:
        """What is below a run or sweep: made for this request, or a file."""
        try:
            if (made := self.server.made(parts, asked)) is not None:
                self._send(made.status, made.body, made.kind)
                return
            parts = [*parts[:-1], parts[-1] or "index.html"] if parts else []
            with self.server.folder.open(parts) as file:
                if file is None:
                    self._say(HTTPStatus.NOT_FOUND, "there is no such page")
                else:
                    self._part(file, content_type(parts[-1]))
        except StorageError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _part(self, file: ShownFile, kind: str) -> None:
        """The file, or the range of it that is asked for."""
        tag = f'"{file.tag}"'
        about = {"Accept-Ranges": "bytes", "ETag": tag}
        if tag in [each.strip().removeprefix("W/") for each in self.headers.get("If-None-Match", "").split(",")]:
            self._head(HTTPStatus.NOT_MODIFIED, about)
            return
        asked = self.headers.get("Range") if self.headers.get("If-Range", tag) == tag else None
        part = None if asked is None else byte_range(asked, file.size)
        if part is not None and not part:
            about["Content-Range"] = f"bytes */{file.size}"
            self._say(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the file has {file.size} bytes", about)
            return
        status = HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT
        if part is not None:
            about["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{file.size}"
        part = range(file.size) if part is None else part
        self._head(status, about | {"Content-Type": kind, "Content-Length": str(len(part))})
        if self.command == "HEAD":
            return
        at = part.start
        while at < part.stop:
            data = file.read(at, min(AT_ONCE, part.stop - at))
            if not data:  # it became shorter: what was promised cannot be sent
                self.close_connection = True
                return
            self.wfile.write(data)
            at += len(data)

    def _say(self, status: HTTPStatus, text: str, about: Mapping[str, str] | None = None) -> None:
        self._send(status, f"{text}\n".encode(errors="replace"), TYPES[".txt"], about)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, about: Mapping[str, str] | None = None) -> None:
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body))} | dict(about or {}))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, about: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in (HEADERS | dict(about)).items():
            self.send_header(name, value)
        self.end_headers()


def content_type(name: str) -> str:
    return TYPES.get(PurePosixPath(name).suffix, OTHER_TYPE)


def byte_range(asked: str, size: int) -> range | None:
    """The bytes that a Range header asks for; empty where there are none, None for a header that is not understood.

    Several ranges are such a header: the whole is sent.
    """
    found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", asked.strip())
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found.groups()
    if not first:
        return range(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)


def is_loopback_name(host: str) -> bool:
    """Whether a Host header names the loopback: localhost or an address of it, with any port or none."""
    name = re.sub(r":[0-9]+$", "", host).strip("[]").lower().rstrip(".")
    try:
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

"""An S3 server in this process, over real sockets, that misbehaves on request: by key, by method, on the n-th time.

It speaks what the product uses (objects, ranges, If-None-Match, listing, multipart uploads) and checks no signatures.
"""

import hashlib
import re
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequestsException"),
    "denied": (403, "AccessDenied"),
    "expired": (403, "ExpiredToken"),
    "skewed": (403, "RequestTimeTooSkewed"),
}
ACTIONS = (*ERRORS, "reset", "cut", "lost", "lost500", "flip", "stall")


@dataclass
class Rule:
    """What goes wrong: `action` on requests that match, on the `nth` of them (0: each), at most `times` times."""

    action: str
    method: str = ".*"
    key: str = ".*"
    nth: int = 0
    times: int = 1 << 30
    share: float = 1.0  # of the requests that match, by a hash of their number
    seen: int = 0
    done: int = 0

    def applies(self, method: str, key: str) -> bool:
        if not (re.fullmatch(self.method, method) and re.search(self.key, key)) or self.done >= self.times:
            return False
        self.seen += 1
        if self.nth not in (0, self.seen):
            return False
        if hashlib.sha256(str(self.seen).encode()).digest()[0] >= 256 * self.share:
            return False
        self.done += 1
        return True


@dataclass
class S3Double:
    """Buckets of objects; use as a context manager."""

    honest: bool = True  # False: If-None-Match is ignored, as some servers do
    rules: list[Rule] = field(default_factory=list)
    objects: dict[tuple[str, str], tuple[bytes, float]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, str, dict[int, bytes]]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    log: list[tuple[str, str]] = field(default_factory=list)
    buckets: set[str] = field(default_factory=lambda: {"bucket"})
    stall_s: float = 3.0

    def __enter__(self) -> "S3Double":
        self.lock = threading.Lock()
        double = self

        class Handler(_Handler):
            server_double = double

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, action: str, **where: object) -> Rule:
        assert action in ACTIONS
        rule = Rule(action, **where)
        self.rules.append(rule)
        return rule

    def action(self, method: str, key: str) -> str | None:
        with self.lock:
            self.requests[method] += 1
            self.log.append((method, key))
            return next((rule.action for rule in self.rules if rule.applies(method, key)), None)


class _Handler(BaseHTTPRequestHandler):
    server_double: S3Double
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        double = self.server_double
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        action = double.action(method if key else "LIST", key or query.get("prefix", ""))
        if action == "reset":
            return self._reset()
        if action == "stall":
            time.sleep(double.stall_s)
            return self._reset()
        if action in ERRORS:
            return self._error(*ERRORS[action])
        if bucket not in double.buckets:
            return self._error(404, "NoSuchBucket")
        answer = self._carry_out(method, bucket, key, query, body)
        if action == "lost":
            return self._reset()
        if action == "lost500":
            return self._error(500, "InternalError")
        return self._answer(*answer, spoil=action)

    def _carry_out(
        self, method: str, bucket: str, key: str, query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        double, place = self.server_double, (bucket, key)
        with double.lock:
            if not key:
                return self._list_uploads(bucket) if "uploads" in query else self._list(bucket, query)
            match method:
                case "POST" if "uploads" in query:
                    upload = uuid.uuid4().hex
                    double.uploads[upload] = (bucket, key, {})
                    return 200, {}, _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
                case "PUT" | "POST" | "DELETE" if query.get("uploadId", "") not in ("", *double.uploads):
                    return 404, {}, _error("NoSuchUpload")
                case "PUT" if "uploadId" in query:
                    double.uploads[query["uploadId"]][2][int(query["partNumber"])] = body
                    return 200, {"ETag": _etag(body)}, b""
                case "POST":
                    parts = double.uploads.pop(query["uploadId"])[2]
                    double.objects[place] = (b"".join(parts[n] for n in sorted(parts)), time.time())
                    return 200, {}, _xml("CompleteMultipartUploadResult", '<ETag>"0"</ETag>')
                case "DELETE" if "uploadId" in query:
                    del double.uploads[query["uploadId"]]
                    return 204, {}, b""
                case "PUT":
                    if double.honest and self.headers.get("If-None-Match") == "*" and place in double.objects:
                        return 412, {}, _error("PreconditionFailed")
                    double.objects[place] = (body, time.time())
                    return 200, {"ETag": _etag(body)}, b""
                case "DELETE":
                    double.objects.pop(place, None)
                    return 204, {}, b""
            if place not in double.objects:
                return 404, {}, _error("NoSuchKey")
            data, mtime = double.objects[place]
        headers = {"ETag": _etag(data), "Last-Modified": formatdate(mtime, usegmt=True)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not asked:
            return 200, headers, data
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if first >= len(data):
            return 416, {}, _error("InvalidRange")
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _list(self, bucket: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        keys = sorted(k for b, k in self.server_double.objects if b == bucket and k.startswith(prefix) and k > after)
        page = keys[:50]  # small pages, so that paging is always tested
        items = "".join(
            f"<Contents><Key>{escape(k)}</Key><Size>{len(data)}</Size><LastModified>{_iso(mtime)}</LastModified></Contents>"
            for k in page
            for data, mtime in [self.server_double.objects[bucket, k]]
        )
        more = len(keys) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return 200, {}, _xml("ListBucketResult", f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}")

    def _list_uploads(self, bucket: str) -> tuple[int, dict[str, str], bytes]:
        items = "".join(
            f"<Upload><Key>{escape(k)}</Key><UploadId>{upload}</UploadId><Initiated>{_iso(time.time())}</Initiated></Upload>"
            for upload, (b, k, _) in self.server_double.uploads.items()
            if b == bucket
        )
        return 200, {}, _xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{items}")

    def _answer(self, status: int, headers: dict[str, str], body: bytes, spoil: str | None = None) -> None:
        if spoil == "flip" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if spoil == "cut":
            self.wfile.write(body[: len(body) // 2])
            self._reset(linger=False)
            return
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, {}, _error(code))

    def _reset(self, *, linger: bool = True) -> None:
        """Closes the connection without an answer; with a TCP reset unless what was sent has to arrive."""
        self.close_connection = True
        if linger:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def _xml(name: str, content: str) -> bytes:
    return f'<?xml version="1.0"?><{name}>{content}</{name}>'.encode()


def _error(code: str) -> bytes:
    return _xml("Error", f"<Code>{code}</Code><Message>injected or true</Message>")


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _iso(mtime: float) -> str:
    return datetime.fromtimestamp(mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

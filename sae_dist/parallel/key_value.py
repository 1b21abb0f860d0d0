"""A key-value store for process groups that accepts only clients with its secret.

torch's own TCPStore accepts anybody who reaches its port, and a malformed message ends the group. Here both sides of a
connection prove that they know the secret, and every message has an HMAC; a connection that fails is closed, without
any other effect.
"""

import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple, Self

from torch.distributed import DistStoreError, Store  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

PROOF_S = 10.0  # allowed for the proof of the secret
NONCE = 32  # bytes
CODE = 32


class StoreAddress(NamedTuple):
    """The address of a store, and its secret."""

    host: str
    port: int
    secret: str

    def __repr__(self) -> str:  # never prints the secret
        return f"StoreAddress({self.host}:{self.port})"


class _KeyValues:
    """The keys and values; thread-safe."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def do(self, verb: str, *given: Any) -> Any:
        with self._changed:
            answer = getattr(self, f"_{verb}")(*given)
            if verb in ("set", "add", "compare_set"):
                self._changed.notify_all()
            return answer

    def _set(self, key: str, value: str) -> None:
        self._values[key] = value.encode("latin-1")

    def _get(self, key: str, timeout_s: float) -> str:
        self._wait([key], timeout_s)
        return self._values[key].decode("latin-1")

    def _add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(total).encode()
        return total

    def _compare_set(self, key: str, expected: str, desired: str) -> str:
        if self._values.get(key, b"") == expected.encode("latin-1"):
            self._values[key] = desired.encode("latin-1")
        return self._values.get(key, expected.encode("latin-1")).decode("latin-1")

    def _check(self, keys: Iterable[str]) -> bool:
        return all(key in self._values for key in keys)

    def _delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def _wait(self, keys: Iterable[str], timeout_s: float) -> None:
        if not self._changed.wait_for(lambda: self._check(keys), timeout_s):
            missing = [key for key in keys if key not in self._values]
            raise TimeoutError(f"nobody set {', '.join(missing[:3])} within {timeout_s:.0f} s")


class _SecretStore(Store):
    """torch's Store on top of `_ask`; raises torch's errors."""

    def _ask(self, verb: str, *given: Any) -> Any:
        raise NotImplementedError

    @property
    def patience_s(self) -> float:
        """Seconds that `get` and `wait` wait, set by `set_timeout`."""
        return self.timeout.total_seconds()  # pyright: ignore[reportAttributeAccessIssue]

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, _text(value))

    def get(self, key: str) -> bytes:
        return self._ask("get", key, self.patience_s).encode("latin-1")

    def add(self, key: str, value: int) -> int:
        return self._ask("add", key, value)

    def compare_set(self, key: str, expected_value: bytes | str, desired_value: bytes | str) -> bytes:
        return self._ask("compare_set", key, _text(expected_value), _text(desired_value)).encode("latin-1")

    def check(self, keys: list[str]) -> bool:
        return self._ask("check", keys)

    def delete_key(self, key: str) -> bool:
        return self._ask("delete_key", key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask("wait", keys, self.patience_s if timeout is None else timeout.total_seconds())

    def clone(self) -> Self:
        return self


def _text(value: bytes | str) -> str:
    """Bytes as a string for JSON, one character a byte."""
    return (value.encode() if isinstance(value, str) else bytes(value)).decode("latin-1")


class PrefixedStore(_SecretStore):
    """The keys of a store with `prefix`. (torch's PrefixStore would not keep the store alive.)"""

    def __init__(self, store: _SecretStore, prefix: str) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=store.patience_s))
        self._store, self._prefix = store, prefix

    def _ask(self, verb: str, *given: Any) -> Any:
        keys, *rest = given
        named = f"{self._prefix}/{keys}" if isinstance(keys, str) else [f"{self._prefix}/{key}" for key in keys]
        return self._store._ask(verb, named, *rest)


class StoreServer(_SecretStore):
    """The store in the process that serves it; `close` stops new connections."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self._values, self._secret, self._warned = _KeyValues(), secrets.token_hex(32), False
        self._listener = socket.create_server((host, 0), backlog=1024)
        self.address = StoreAddress(host, self._listener.getsockname()[1], self._secret)
        threading.Thread(target=self._accept, name="rendezvous", daemon=True).start()

    def close(self) -> None:
        """Stops listening; existing connections stay open."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self._listener.close()

    def _ask(self, verb: str, *given: Any) -> Any:
        try:
            return self._values.do(verb, *given)
        except TimeoutError as error:
            raise DistStoreError(str(error)) from None

    def _accept(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or no descriptor is free at the moment
                time.sleep(0.1)
                continue
            threading.Thread(target=self._answer, args=(connection,), name="rendezvous", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                channel = _Channel(connection, self._secret, serves=True)
                while True:
                    verb, *given = channel.receive()
                    try:
                        channel.send(["done", self._values.do(verb, *given)])
                    except TimeoutError as error:
                        channel.send(["late", str(error)])
            except PermissionError as stranger:
                if not self._warned:
                    self._warned = True
                    logger.warning("refused a connection to the ranks' rendezvous, and more like it: %s", stranger)
            except (OSError, EOFError):  # the client has left
                return


class StoreClient(_SecretStore):
    """The store from another process: one connection, one call at a time. DistStoreError where it is out of reach."""

    def __init__(self, place: StoreAddress, timeout_s: float) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout_s))
        self._lock = threading.Lock()
        try:
            connection = socket.create_connection(place[:2], timeout=timeout_s)
            self._channel = _Channel(connection, place.secret, serves=False)
        except (OSError, EOFError) as error:
            raise DistStoreError(
                f"the ranks' rendezvous at {place.host}:{place.port} is out of reach ({error})"
            ) from None

    def _ask(self, verb: str, *given: Any) -> Any:
        with self._lock:
            try:
                self._channel.send([verb, *given])
                how, answer = self._channel.receive()
            except (OSError, EOFError) as error:
                self._channel.close()
                raise DistStoreError(f"the process that served the ranks' rendezvous is gone ({error})") from None
        if how == "late":
            raise DistStoreError(answer)
        return answer


class _Channel:
    """A connection on which both ends have proved that they know the secret; else PermissionError."""

    def __init__(self, connection: socket.socket, secret: str, *, serves: bool) -> None:
        self._connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(PROOF_S)
        ours = secrets.token_bytes(NONCE)
        connection.sendall(ours)
        theirs = self._read(NONCE)
        nonces = ours + theirs if serves else theirs + ours  # the server's first
        self._key = hmac.digest(secret.encode(), nonces, "sha256")
        self._roles = (b"server", b"client") if serves else (b"client", b"server")
        self._sent = self._received = 0
        self.send("hello")
        if self.receive() != "hello":
            raise PermissionError("the other side does not know the secret")
        connection.settimeout(None)

    def close(self) -> None:
        self._connection.close()

    __del__ = close

    def send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        self._connection.sendall(len(body).to_bytes(4, "big") + self._code(self._roles[0], self._sent, body) + body)
        self._sent += 1

    def receive(self) -> Any:
        head = self._read(4 + CODE)
        size = int.from_bytes(head[:4], "big")
        if not self._received and size > 64:  # nothing long is read before the proof
            raise PermissionError("the other side does not know the secret")
        body = self._read(size)
        if not hmac.compare_digest(head[4:], self._code(self._roles[1], self._received, body)):
            raise PermissionError("the other side does not know the secret")
        self._received += 1
        return json.loads(body)

    def _code(self, role: bytes, number: int, body: bytes) -> bytes:
        return hmac.digest(self._key, role + number.to_bytes(8, "big") + body, "sha256")

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self._connection.recv(size - len(found))
            if not part:
                raise EOFError("the connection was closed")
            found += part
        return found

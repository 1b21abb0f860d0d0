"""A server that speaks chat completions: it labels by the token that is marked most often, and judges by that token."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-secret-that-nobody-may-see"


class ChatServer:
    """On a port of its own until `close`."""

    def __init__(self) -> None:
        self.asked: list[str] = []  # prompts that were answered
        self.keys: set[str | None] = set()
        self.answers_left: int | None = None  # then each request is refused as wrong
        self.failures: list[tuple[int, dict[str, str]]] = []  # status and headers of the next requests
        self.content: str | None = None  # in place of what the prompt asks for
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"chat": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer
    guard = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key, prompt = self.headers["Authorization"], body["messages"][0]["content"]
        with self.guard:
            self.chat.keys.add(key)
            if self.chat.failures:
                status, headers = self.chat.failures.pop(0)
                return self._send(status, {"error": {"message": f"no, {key}"}}, headers)
            if self.chat.answers_left == 0:
                return self._send(400, {"error": {"message": f"enough\nof {key}"}})
            if self.chat.answers_left is not None:
                self.chat.answers_left -= 1
            self.chat.asked.append(prompt)
        content = (self.chat.content or _answer(prompt)) + (f" {key}" if "The list:" not in prompt else "")
        return self._send(200, {"choices": [{"message": {"content": content}}]})

    def _send(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": f"{len(data)}", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _answer(prompt: str) -> str:
    def marked(text: str) -> list[str]:
        return re.findall(r"⟦\s*([^⟧]*?)\s*⟧", text)

    if "The list:" not in prompt:
        return Counter(marked(prompt.split("first texts:")[1].split("It is not active")[0])).most_common(1)[0][0]
    head, texts = prompt.split("The texts:\n")
    label = json.loads(head.rsplit("The description: ", 1)[1].strip()).split()[0]
    return f"They are {[int(label in marked(text)) for text in texts.splitlines() if text.startswith(chr(34))]}"

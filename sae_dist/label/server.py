"""A language model behind an OpenAI-compatible server: chat completions over HTTP, with retries."""

import json
import logging
import os
import threading
import urllib.request
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from sae_dist.config import UserError
from sae_dist.label.config import LabelConfig
from sae_dist.label.prompts import Prompt

logger = logging.getLogger(__name__)

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT_S = 60.0
LARGEST = 4 << 20  # bytes of an answer


class Refused(Exception):
    """An answer that is worth another try; `wait` is what the server asks for, in seconds."""

    def __init__(self, said: str, wait: float = 0.0) -> None:
        super().__init__(said)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key and the text elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Server:
    """Chat completions of one model. The key is in no message, file or log, also where the server repeats it."""

    def __init__(self, config: LabelConfig) -> None:
        """UserError where the environment variable with the key is not set, or holds what no header can."""
        assert config.url is not None
        self.at_once, self._config = config.requests, config
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._key = None if config.key_env is None else os.environ.get(config.key_env, "").strip()
        if self._key == "":
            raise UserError(f"label.key_env={config.key_env}: no such environment variable is set; put the key in it")
        if self._key and not (self._key.isascii() and self._key.isprintable()):  # http.client would show it
            raise UserError(
                f"label.key_env={config.key_env}: what that environment variable holds has line breaks or characters "
                "beyond ASCII, and is no key; put the key alone in it, without quotes"
            )
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._reached, self._stopping = False, threading.Event()
        parts = urlsplit(config.url)
        if self._key and parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("label.url is plain http: the key and the text may be read on the way to %s", parts.hostname)

    @property
    def identity(self) -> list[Any]:
        return [self._url, self._config.model, self._config.body]

    def ask(self, prompt: Prompt) -> str:
        """The answer; UserError where there is none, after retries."""
        body = {
            "model": self._config.model, "max_tokens": prompt.max_tokens, "temperature": 0,
            "messages": [{"role": "user", "content": prompt.text}],
        } | (self._config.body or {})  # fmt: skip
        data = json.dumps({key: value for key, value in body.items() if value is not None}).encode()
        for number in range(self._config.retries + 1):
            try:
                return self._text(self._post(data))
            except Refused as why:
                wait = min(max(why.wait, self._config.backoff * 2**number), LONGEST_WAIT_S)
                if number == self._config.retries or not self._reached or self._stopping.is_set():
                    raise UserError(f"label.url={self._config.url} {why}") from None
                logger.warning("%s %s; again in %.3g s", self._config.url, why, wait)
                self._stopping.wait(wait)
        raise AssertionError

    def stop(self) -> None:
        self._stopping.set()

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._config.timeout) as answer:
                self._reached = True
                return answer.read(LARGEST)
        except HTTPError as error:
            self._reached = True
            with error:
                raise self._refusal(error.code, error.headers, error.read(LARGEST)) from None
        except (OSError, HTTPException) as error:  # a URLError is an OSError
            reason = getattr(error, "reason", error)
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise Refused(f"cannot be reached ({said}); check the address, and that the server runs") from None

    def _refusal(self, status: int, headers: Message, body: bytes) -> Exception:
        said = f"{status}: {self._said(body)}"
        if status in RETRIED:
            asked = headers.get("Retry-After", "")
            wait = float(asked) if asked.isascii() and asked.isdigit() else 0.0
            return Refused(f"has no answer ({said}); repeat the command later, or lower label.requests", wait)
        where = f"label.url={self._config.url}"
        if status in (401, 403) and self._key is None:
            return UserError(
                f"{where} asks for a key ({said}); name the environment variable that holds it: label.key_env=NAME"
            )
        if status in (401, 403):
            return UserError(
                f"{where} refuses the key ({said}); put another one into the environment variable "
                f"{self._config.key_env}"
            )
        if status == 404:
            return UserError(
                f"{where} does not know label.model={self._config.model}, or has no chat/completions ({said}); check "
                "both: the address mostly ends in /v1"
            )
        if 300 <= status < 400:
            return UserError(f"{where} sends requests elsewhere ({status}), where no key should go; give that address")
        return UserError(
            f"{where} refuses the request ({said}); label.body changes what is sent, label.per_question and "
            "label.contexts shorten it"
        )

    def _text(self, body: bytes) -> str:
        try:
            choice = json.loads(body)["choices"][0]["message"]
            text = choice["content"] or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(
                f"label.url={self._config.url} answers something else than a chat completion ({self._said(body)}); "
                "check the address, which mostly ends in /v1"
            ) from None
        return self._without_key(text)

    def _said(self, body: bytes) -> str:
        """What the server gave as its reason, as part of a line for a terminal."""
        text = body.decode(errors="replace")
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, LookupError, TypeError, RecursionError):
            pass  # a text, which says it itself
        text = "".join(c if c.isprintable() else " " for c in self._without_key(text))
        return " ".join(text.split())[:200] or "without a reason"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "...") if self._key else text

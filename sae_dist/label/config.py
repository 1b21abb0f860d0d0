"""Which latents are labelled, by whom, and how labels are scored."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sae_dist.config import frozen


@frozen
class LabelConfig:
    """The labeller and its evidence; keys from `url` on are for a server, `model` also for a local model."""

    by: Literal["offline", "server", "model"] = "offline"  # tokens in a template, a chat server, a local model
    # null: all that fire; a number: so many of them by chance; or a list of latents
    latents: PositiveInt | tuple[NonNegativeInt, ...] | None = None
    contexts: PositiveInt = 16  # of a latent, at most, that the labeller is shown
    held_out: PositiveInt = 16  # of a latent, at most, on which its label is scored, and as many of other latents
    scored: NonNegativeInt | None = None  # of the latents, by chance, that are scored; null: all
    seed: NonNegativeInt = 0  # of what is shown, held out, drawn and marked
    model: str | None = None  # the server's name of a model; or a Hugging Face model, smollm2 by default
    url: str | None = None  # of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1
    key_env: str | None = None  # name of the environment variable that holds the server's key; null: no key is sent
    requests: PositiveInt = 4  # at once
    timeout: PositiveFloat = 120.0  # seconds for an answer
    retries: NonNegativeInt = 5  # of a request that the server has no time for, or that breaks
    backoff: NonNegativeFloat = 1.0  # seconds before the first retry; each one waits twice as long
    body: dict[str, Any] | None = None  # more of each request's body, such as {top_p: 1}; null takes a key out
    max_tokens: PositiveInt = 200  # of an answer
    per_question: PositiveInt = 16  # contexts that are judged in one answer

    def __post_init__(self) -> None:
        if self.by == "server":
            self._check_server()
        else:
            for key, value in {"url": self.url, "key_env": self.key_env, "body": self.body}.items():
                if value is not None:
                    raise ValueError(f"{key}={value} is for a server; give by=server with it")
        if self.by == "offline" and self.model is not None:
            raise ValueError(f"model={self.model} is given, but by=offline asks no model; give by=server or by=model")
        if self.latents == ():
            raise ValueError("latents=[] names none; give numbers of latents, or null for all")

    def _check_server(self) -> None:
        if self.url is None or self.model is None:
            missing = "url" if self.url is None else "model"
            raise ValueError(f"{missing} is missing; by=server needs url=http://HOST:PORT/v1 and model=NAME")
        try:
            parts = urlsplit(self.url)
            is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            raise ValueError("url is no address; give one such as http://127.0.0.1:8000/v1") from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                "url has a user, a password or a query in it, which would be written to files; give the address "
                "alone, and the key in the environment variable that key_env= names"
            )
        if not is_plain:
            raise ValueError(f"url={self.url} is no address; give one such as http://127.0.0.1:8000/v1")

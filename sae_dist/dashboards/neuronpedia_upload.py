"""Latents to neuronpedia.org through its own client (the extra `neuronpedia`), 128 at a time.

The model and the set of sources have to be there; only who made the set may send to it. What was sent is kept beside
the run, so that a repeated command goes on. The key is NEURONPEDIA_API_KEY, and is never printed or written.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from sae_dist.config import UserError, digest
from sae_dist.dashboards.latents import Context, Latent, Latents
from sae_dist.dashboards.source import Source
from sae_dist.run_files import read_json, write_json

SCHEME = "neuronpedia://"
BATCH = 128  # the most that the client takes at once
CURE = "remove it to send all latents again"


class Sent(TypedDict):
    """What was sent to a source."""

    of: str  # hash of the weights and of what is known of them
    batches: int


def address_of(to: str) -> tuple[str, str]:
    """MODEL and SET of neuronpedia://MODEL/SET; UserError for anything else."""
    model, _, set_name = to.removeprefix(SCHEME).partition("/")
    if not (to.startswith(SCHEME) and model and set_name and "/" not in set_name):
        raise UserError(f"to={to} is no address there; give neuronpedia://MODEL/SET")
    return model, set_name


def upload(latents: Latents, source: Source, run: Path) -> Iterator[int]:
    """Yields how many latents each batch had that was sent now."""
    record = run / f"neuronpedia-{source.model}-{source.name}.json"
    of = digest([latents.features.about.get("weights"), latents.features.rows, source])
    sent: Sent = read_json(record, Sent, cure=CURE) if record.is_file() else {"of": of, "batches": 0}
    if sent["of"] != of:
        raise UserError(
            f"{record} is of other latents that were sent to {source.name}; {CURE}, or choose another set of sources"
        )
    client = _client()
    there = client.Source(id=source.name, model_id=source.model, set_name=source.set_name)
    for fired, _ in latents.batches(BATCH, done=sent["batches"]):
        if fired:
            with _errors(source):
                there.upload_batch([_feature(client, latent, source) for latent in fired])
        sent["batches"] += 1
        write_json(record, sent)
        yield len(fired)


class _Client:
    """The client's classes."""

    def __init__(self) -> None:
        from neuronpedia.np_activation import Activation
        from neuronpedia.np_explanation import Explanation
        from neuronpedia.np_feature import Feature, Logit
        from neuronpedia.np_source import Source as There

        self.Activation, self.Explanation, self.Feature, self.Logit = Activation, Explanation, Feature, Logit
        self.Source = There


def _client() -> _Client:
    try:
        return _Client()
    except ImportError:
        raise UserError("Neuronpedia's client is not installed; run `pip install neuronpedia`") from None


def _feature(client: _Client, latent: Latent, source: Source) -> Any:
    named: dict[str, Any] = {"modelId": source.model, "source": source.name, "index": latent.number}
    explanations = []
    if latent.label is not None:
        explanations = [client.Explanation(**named, text=latent.label, method=source.labelled_by)]
    return client.Feature(
        **named, density=latent.density,
        top_logits=[client.Logit(token, value) for token, value in latent.promoted],
        bottom_logits=[client.Logit(token, value) for token, value in latent.suppressed],
        explanations=explanations,
        activations=[client.Activation(**named, **_shown(context)) for context in latent.contexts],
    )  # fmt: skip


def _shown(context: Context) -> dict[str, Any]:
    low, high, share = context.interval or (None, None, None)
    return {"tokens": context.tokens, "values": context.values, "quantileMin": low, "quantileMax": high,
            "quantileFraction": share}  # fmt: skip


@contextlib.contextmanager
def _errors(source: Source) -> Iterator[None]:
    """The client's errors in one line with the cure, and nothing of what it prints."""
    import requests
    from neuronpedia.requests import base_request as of

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except of.NPKeyMissingError:
            raise UserError("NEURONPEDIA_API_KEY is not set; it is on neuronpedia.org/account") from None
        except of.NPUnauthorizedError:
            raise UserError(f"Neuronpedia does not take this key for {source.name}; see NEURONPEDIA_API_KEY") from None
        except of.NPRateLimitError:
            raise UserError("Neuronpedia takes no more for now; repeat the command later, and it goes on") from None
        except (of.NPInvalidResponseError, requests.RequestException) as error:
            said = str(error).splitlines()[0][:300]
            raise UserError(
                f"Neuronpedia did not take latents of {source.name} ({said}); see that {source.model} and the set "
                f"{source.set_name} are there, and repeat the command: it goes on"
            ) from None

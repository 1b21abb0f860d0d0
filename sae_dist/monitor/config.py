"""How a run is tracked and watched; none of it changes what comes out."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from sae_dist.config import frozen

OF_ENVIRONMENT: Any = Field(default=None, validate_default=True)
OLD_NAMES = {"dryrun": "offline", "run": "online"}  # that WANDB_MODE may still have
WEBHOOK = "SAE_DIST_WEBHOOK"  # of the environment
Mode = Literal["offline", "online", "disabled"]


def _mode(given: object) -> object:
    """The mode that was given, else WANDB_MODE of the environment, else offline."""
    if given is not None:
        return given
    mode = os.environ.get("WANDB_MODE") or "offline"
    return OLD_NAMES.get(mode, mode)


def _project(given: object) -> object:
    return given if given is not None else os.environ.get("WANDB_PROJECT") or "sae_dist"


def _webhook(given: object) -> object:
    """The URL that was given, else that of the environment; a wrong one is not shown, since it is a secret."""
    url = given if given is not None else os.environ.get(WEBHOOK) or None
    if url is not None and not (isinstance(url, str) and _is_address(url)):
        raise ValueError("it is no URL that begins with https:// or http:// and a host; it is not shown here")
    return url


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


@frozen
class WandbConfig:
    """Tracking in Weights & Biases; `offline` writes under the run's folder and `wandb sync` uploads it later.

    `mode` and `project` are never null: where null is given, the environment says which.
    """

    # offline, online or disabled; null: WANDB_MODE of the environment, else offline
    mode: Annotated[Mode, BeforeValidator(_mode)] = OF_ENVIRONMENT
    project: Annotated[str, BeforeValidator(_project)] = OF_ENVIRONMENT  # null: WANDB_PROJECT, else sae_dist
    entity: str | None = None
    group: str | None = None  # what holds the run's harvest, dictionaries and evaluations together; null: its name


@frozen
class PrometheusConfig:
    """An HTTP endpoint that Prometheus may ask for the newest figures."""

    port: Annotated[int, Field(ge=0, le=65535)] | None = None  # null: none; 0: a free one, which the log names
    address: str = "127.0.0.1"  # that it listens at; another one lets other machines ask


@frozen
class AlertsConfig:
    """When the log, W&B and a webhook say that something is amiss; null turns an alert off."""

    # URL that alerts are posted to as JSON; null: SAE_DIST_WEBHOOK of the environment, where a secret is safer
    webhook: Annotated[str | None, BeforeValidator(_webhook)] = OF_ENVIRONMENT
    starved: Annotated[float, Field(gt=0, lt=1)] | None = 0.2  # share of its time that training waits for rows
    starved_s: Annotated[float, Field(gt=0)] = 300.0  # seconds that alerts.starved is a share of
    stalled_s: Annotated[float, Field(gt=0)] | None = 1800.0  # seconds without a line of figures
    no_commit_s: Annotated[float, Field(gt=0)] | None = 1800.0  # seconds without a new unit of a harvest at work
    dead: Annotated[float, Field(ge=0, lt=1)] | None = 0.5  # share of a dictionary's latents that are dead
    disk_free: Annotated[float, Field(gt=0, lt=1)] | None = 0.05  # share of the disk of out= that is left
    cost: Annotated[float, Field(gt=0)] | None = None  # what the training may cost, over all attempts
    price_per_hour: Annotated[float, Field(gt=0)] | None = None  # of an hour of training; alerts.cost needs it

    def __post_init__(self) -> None:
        if (self.cost is None) != (self.price_per_hour is None):
            raise ValueError("alerts.cost and alerts.price_per_hour go together; set both or none")


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A job's values without what is secret in them: what may be written to files and sent to trackers.

    Loaded again they take it from the environment, where `keep_secrets` leaves it for processes that this one starts.
    """
    return {**values, "alerts": {**values["alerts"], "webhook": None}} if "alerts" in values else dict(values)


def public_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line without those that name the webhook, however they do."""
    return [each for each in arguments if "webhook" not in each]


def keep_secrets(alerts: AlertsConfig) -> None:
    """Puts what `public` leaves out into the environment of this process."""
    if alerts.webhook is not None:
        os.environ[WEBHOOK] = alerts.webhook

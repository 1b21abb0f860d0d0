"""How a run is tracked; none of it changes what comes out."""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sae_dist.config import frozen

OF_ENVIRONMENT: Any = Field(default=None, validate_default=True)
OLD_NAMES = {"dryrun": "offline", "run": "online"}  # that WANDB_MODE may still have


def _mode(given: object) -> object:
    """The mode that was given, else WANDB_MODE of the environment, else offline."""
    if given is not None:
        return given
    mode = os.environ.get("WANDB_MODE") or "offline"
    return OLD_NAMES.get(mode, mode)


def _project(given: object) -> object:
    return given if given is not None else os.environ.get("WANDB_PROJECT") or "sae_dist"


@frozen
class WandbConfig:
    """Tracking in Weights & Biases; `offline` writes under the run's folder and `wandb sync` uploads it later.

    `mode` and `project` are never null: where null is given, the environment says which.
    """

    # offline, online or disabled; null: WANDB_MODE of the environment, else offline
    mode: Annotated[Literal["offline", "online", "disabled"], BeforeValidator(_mode)] = OF_ENVIRONMENT
    project: Annotated[str, BeforeValidator(_project)] = OF_ENVIRONMENT  # null: WANDB_PROJECT, else sae_dist
    entity: str | None = None
    group: str | None = None

"""How dictionaries are compared."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from sae_dist.config import frozen

Measure = Literal["cosine", "correlation"]


@frozen
class CompareConfig:
    """Which rows are read, and when two latents are taken for the same."""

    # a store that all of them read; null: that of each one's run, or of the first that has one
    store: str | None = None
    tokens: PositiveInt = 1_000_000  # held-out rows that are read, the first of them
    # what tells whether two latents match; null: the cosine of their decoder rows where both rebuild the same
    # activations, else the correlation of their activations
    match: Measure | None = None
    level: Annotated[float, Field(gt=0, le=1)] = 0.7  # from which on they match
    partners: PositiveInt = 5  # of each latent of one dictionary alone: those that it fires with most
    inputs: PositiveInt = 5  # of each latent of a later layer: those of an earlier one that raise and lower it most
    shown: Annotated[int, Field(ge=1, le=1000)] = 20  # rows of each table of the page
    seed: NonNegativeInt = 0  # of what chance gives

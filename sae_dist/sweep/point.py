"""One point of a sweep: a configuration, and what became of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

State = Literal["pending", "leased", "done", "failed"]


@dataclasses.dataclass(frozen=True)
class Point:
    """What the ledger knows of one point. The report is a pure function of a list of these."""

    id: str  # hash of the resolved configuration, without the places that it is written to
    overrides: Mapping[str, Any]  # the swept keys with this point's values: {"sae.n_latents": 4096, "seed": 1}
    state: State = "pending"
    tries: int = 0
    seconds: float | None = None  # wall seconds of its training; a pass of several is divided among them by their work
    cost: float | None = None  # seconds times what an hour is said to cost; None where nobody said
    summary: Mapping[str, Any] | None = None  # summary.json of a point that is done
    stopped_at: int | None = None  # done, but stopped early: by the stopping rule, after so many steps
    stopped_why: str | None = None  # what the rule said, in one line
    failure: str | None = None  # the last failure in one line

"""Which hook points of a store are taken together: those that a dictionary reads, and those that it rebuilds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae_dist.config import UserError
from sae_dist.shards.format import StoreMeta


class Hooks(NamedTuple):
    """Names of hook points; the rows of several lie side by side, in this order.

    A sparse autoencoder rebuilds what it reads, a transcoder something else.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()  # (): what it reads

    def __str__(self) -> str:
        return "+".join(self.reads) + ("" if self.rebuilds_input else f" -> {'+'.join(self.writes)}")

    @property
    def rebuilds_input(self) -> bool:
        """Whether the rows that go in are the rows to be rebuilt."""
        return self.writes in ((), self.reads)

    @property
    def every(self) -> tuple[str, ...]:
        """Each once: a hook point that is on both sides is read once."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """The hook points of each tensor that a batch has: of x, and of the target where that is another tensor."""
        return (self.reads,) if self.rebuilds_input else (self.reads, self.writes)


def widths(meta: StoreMeta, hooks: Sequence[str]) -> dict[str, int]:
    """Of the rows of each of these hook points."""
    return {hook: meta.hooks[hook] for hook in hooks}


def width(meta: StoreMeta, hooks: Sequence[str]) -> int:
    """Of the rows of these hook points side by side."""
    return sum(meta.hooks[hook] for hook in hooks)


def sides(hooks: Hooks, meta: StoreMeta) -> dict[str, Any]:
    """What a dictionary says of them, in its config.json and in a summary: what it reads, and what it rebuilds."""
    said: dict[str, Any] = {"hook": "+".join(hooks.reads), "d_model": width(meta, hooks.reads)}
    if len(hooks.reads) > 1:
        said["sites"] = _listed(meta, hooks.reads)
    if hooks.rebuilds_input:
        return said
    said |= {"target_hook": "+".join(hooks.writes), "d_out": width(meta, hooks.writes)}
    return said | ({"target_sites": _listed(meta, hooks.writes)} if len(hooks.writes) > 1 else {})


def said_by(info: Mapping[str, Any]) -> Hooks:
    """The hooks of which `sides` said this."""

    def names(hook: str, sites: str) -> tuple[str, ...]:
        return tuple(site["hook"] for site in info[sites]) if sites in info else (info[hook],)

    return Hooks(names("hook", "sites"), names("target_hook", "target_sites") if "target_hook" in info else ())


def _listed(meta: StoreMeta, hooks: Sequence[str]) -> list[dict[str, Any]]:
    """Of several hook points, in the order of their columns."""
    return [{"hook": hook, "width": width} for hook, width in widths(meta, hooks).items()]


def check(hooks: Hooks, meta: StoreMeta, place: str) -> None:
    """UserError where the store at `place` lacks a hook point, or one is named twice on a side."""
    for names in (hooks.reads, hooks.writes):
        if missing := [hook for hook in names if hook not in meta.hooks]:
            raise UserError(f"hook={missing[0]} is not in {place}; it has {', '.join(meta.hooks)}")
        if len(set(names)) < len(names):
            raise UserError(f"hook={'+'.join(names)} names a hook point twice; name each once")
    if not hooks.reads:
        raise UserError(f"no hook point of {place} is named to be read; it has {', '.join(meta.hooks)}")

"""Whether a cluster has room for a group of processes, and a message for when it has not."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Bundle(NamedTuple):
    """What one process reserves; all processes of a group reserve the same."""

    cpus: float
    gpus: float

    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in self.resources().items()) + "}"


class Node(NamedTuple):
    """A machine of the cluster: its total and its free resources."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def fits(bundle: Bundle, has: Mapping[str, float]) -> int:
    """How many bundles fit into the resources `has`."""
    return min(math.floor(has.get(name, 0) / amount + 1e-9) for name, amount in bundle.resources().items())


def never_fits(bundle: Bundle, size: int, nodes: Sequence[Node]) -> bool:
    """Whether `size` bundles would not fit even into the empty cluster."""
    return sum(fits(bundle, node.total) for node in nodes) < size


def explain(bundle: Bundle, size: int, nodes: Sequence[Node]) -> str:
    """What a group that is not placed waits for, as one clause: the bundles, and what every node has."""
    has = "; ".join(f"{node.name} has {_free(node)}" for node in nodes[:4])
    more = f"; and {len(nodes) - 4} more nodes" if len(nodes) > 4 else ""
    return f"{size} x {bundle}, one for each of its processes; {has or 'there are no nodes'}{more}"


def _free(node: Node) -> str:
    """CPU 2, GPU 0 free of CPU 3, GPU 1."""
    names = [name for name in ("CPU", "GPU") if name == "CPU" or node.total.get(name)]
    free, total = (", ".join(f"{name} {has.get(name, 0):g}" for name in names) for has in (node.free, node.total))
    return f"{free} free of {total}"

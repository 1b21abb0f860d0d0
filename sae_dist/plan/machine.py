"""A machine as data: memory of a device, its rate for each kind of work, and its links to others."""

from dataclasses import field
from typing import Annotated, Literal, Protocol

from pydantic import Field

from sae_dist.config import frozen

Backend = Literal["triton", "cpu", "torch"]
Positive = Annotated[float, Field(gt=0)]


@frozen
class Rates:
    """Rates of a device for each kind of work of a step; `seconds.amounts` says how much of each there is."""

    product: Positive  # FLOP/s of the encoder's product, selection included where the kernel fuses it
    select: Positive | None = None  # pre-activations/s that a separate top k looks through; null: fused, costs nothing
    gather: Positive  # bytes/s of rows of W_dec, x and errors read at scattered places
    stream: Positive  # bytes/s of passes over whole tensors: the optimiser above all
    step_s: Annotated[float, Field(ge=0)] = 0.0  # per step, whatever its size: launches, Python, the host


@frozen
class Link:
    """A link between ranks: a collective takes calls x latency_s + bytes received / bytes_per_s."""

    bytes_per_s: Positive  # received by a rank, one direction
    latency_s: Annotated[float, Field(ge=0)]  # of one collective


class Holding(Protocol):
    """What the memory of a rank depends on, of a machine."""

    @property
    def backend(self) -> Backend: ...
    @property
    def runtime(self) -> float: ...


@frozen
class Machine:
    """One kind of machine; a run takes as many as its mesh needs. Amounts are in bytes, FLOP and seconds."""

    name: str
    backend: Backend  # which kernels a step uses; memory depends on it
    devices: Annotated[int, Field(ge=1)]  # accelerators, 1 where the processor itself computes
    memory: Positive  # bytes of a device
    host_memory: Positive  # bytes beside the devices of a machine
    runtime: Annotated[float, Field(ge=0)]  # bytes of a rank before its first tensor: context, libraries, interpreter
    rates: Rates
    link: Link  # between the ranks of one machine
    network: Link  # between machines, a device's share
    read: Positive  # bytes/s that one machine reads from its object storage
    harvest: Positive  # FLOP/s of a language model's forward pass on one device
    device_hour: Annotated[float, Field(ge=0)] | None = None  # price, in the currency of your choice; null: not priced
    notes: dict[str, float] = field(default_factory=dict)  # other figures of the probe, for the record
    source: str = ""  # where the figures come from

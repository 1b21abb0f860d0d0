"""Bytes that the largest rank holds, part by part, at the fullest moment of a step.

A step's phases do not overlap: what a phase needs for itself counts once, as the largest of them.
"""

from typing import NamedTuple

from sae_dist.plan.machine import Machine
from sae_dist.plan.workload import Workload

TILE = 4096  # latents that plain torch multiplies at a time (sae_kernels.plain)
MIB = 1 << 20


class Part(NamedTuple):
    """One line of the table; `host` parts lie beside an accelerator, not on it."""

    name: str
    bytes: float
    host: bool = False


def memory(work: Workload, machine: Machine) -> list[Part]:
    """What one rank holds; the sum is the most that it ever needs."""
    weights = work.latents * work.d_model
    accelerator = machine.backend == "triton"
    return [
        Part("program and libraries", machine.runtime),
        Part("parameters, fp32", 4 * (2 * weights + work.latents + work.d_model)),
        Part("Adam's moments, fp32", 8 * (2 * weights + work.latents + work.d_model)),
        *([] if machine.backend == "torch" else [Part("W_enc, bf16 copy for the product", 2 * weights)]),
        Part("silence counters and masks", (8 + 1) * work.latents),
        Part("batch: rows, errors, pairs", batch_bytes(work, machine)),
        Part("largest phase of a step", phase_bytes(work, machine)),
        Part("loader: windows and batches ahead", loader_bytes(work), host=accelerator),
        Part("checkpoint: copy while it is written", state_bytes(work), host=accelerator),
    ]


def state_bytes(work: Workload) -> float:
    """What a checkpoint holds of one rank: weights and both moments in fp32, counters."""
    return 12 * (2 * work.latents * work.d_model + work.latents + work.d_model) + 8 * work.latents


def batch_bytes(work: Workload, machine: Machine) -> float:
    """Tensors of the batch that live through the whole step."""
    d, k = work.d_model, work.k
    row = 2 * d + 4 * d + 4 * d  # as read, scaled fp32, error
    if machine.backend != "torch":
        row += 2 * d  # rounded for the product
    pair = 8 + 8 + 4  # value, index, d_z
    return work.batch * (row + pair * k)


def phase_bytes(work: Workload, machine: Machine) -> float:
    """The phase with the largest temporaries: selection, or the update."""
    weights = work.latents * work.d_model
    match machine.backend:
        case "torch":  # two dense gradients, the one without its parallel part, Adam's two corrected moments
            return max(5 * 4 * weights, work.rows * TILE * 40)
        case "cpu":  # candidates of select; partial sums of b_dec's gradient, one a chunk of 64 latents
            return work.rows * 8 * (work.k + max(work.k, 64)) + weights / 16 + 16 * work.batch * work.k
        case "triton":  # keys above the bound (16 k a row); sorted pairs
            return work.rows * 8 * 16 * work.k + 3 * 16 * work.batch * work.k
    raise AssertionError(machine.backend)


def loader_bytes(work: Workload) -> float:
    """Open slices of this rank's lanes, the batches that wait, and the sample that initialisation reads."""
    lanes = -(-work.lanes // work.data)
    slices = 2 * lanes * work.window * work.slice_rows
    if work.store_rows:
        slices = min(slices, work.store_rows)
    return (slices + work.prefetch * work.rows) * work.d_model * work.stored_bytes

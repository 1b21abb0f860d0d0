"""Bytes of the largest rank, item by item, at the peak of a step.

The phases of a step do not overlap, so only the phase with the most memory counts. The tensors are those of
`train.parallel.step` and its kernels; `parallel.simulate` counts them in the program itself.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from sae_kernels.eight_bit import block_of
from sae_kernels.ordered import CHUNK

from sae_dist.plan.machine import Holding
from sae_dist.plan.workload import Workload
from sae_dist.sae.variants.interface import Elementwise, Nested, Sizes
from sae_dist.train.parallel.batch_select import initial_width
from sae_dist.train.parallel.choose import LINE_WIDTH
from sae_dist.train.parallel.row_select import pays_two_rounds

TILE = 4096  # latents that plain torch multiplies at a time (sae_kernels.plain)
KEYS = 24  # bytes a pre-activation of a tile while its keys are made: z, relu(z), and two int64
PARAMETERS = {"float32": "parameters, fp32", "bfloat16_stochastic": "parameters, bf16"}  # names of a line
MOMENTS = {
    "float32": "Adam's moments, fp32",
    "int8": "Adam's moments, 8-bit",
    "factored": "Adam's moments, factored",
}
OF_A_PAIR = 8  # z, value, cost, their gradients and masks, where a value is not z itself


class MemoryItem(NamedTuple):
    """One line of the table; `host` items are in host memory, not on an accelerator."""

    name: str
    bytes: float
    host: bool = False


def memory(work: Workload, machine: Holding) -> list[MemoryItem]:
    """The memory of one rank; the sum of the items is its peak.

    The dictionaries of a pass share the program, the loader and the rows, and take their steps one after the other.
    """
    d_model = work.d_model
    accelerator = machine.backend == "triton"
    each = [step_bytes(member, machine) for member in work.members]
    shared = [shared_bytes(member, machine) for member in work.members]
    batch = sum(held for held, _ in each) - sum(shared) + max(shared)
    phase = max(phase for _, phase in each)
    if work.masked:  # gradients of both matrices, dense
        phase = max(phase, max(8 * member.latents * d_model for member in work.members))
    largest = max(member.latents for member in work.members)
    copies = sum(map(functools.partial(copy_bytes, machine=machine), work.members))
    start = 8 * largest * d_model - batch  # initial weights until they are freed, when there is no batch
    return [
        MemoryItem("program and libraries", machine.runtime),
        *_named((PARAMETERS[member.state.parameters], parameter_bytes(member)) for member in work.members),
        *_named((MOMENTS[member.state.moments], moment_bytes(member)) for member in work.members),
        *([MemoryItem("W_enc, bf16 copy", copies)] if copies else []),
        MemoryItem("silence counters", 8 * sum(member.latents for member in work.members)),
        MemoryItem("batch: rows, errors, pairs", batch),
        MemoryItem(
            "largest phase of a step" if phase >= start else "the start, when weights are copied in", max(phase, start)
        ),
        MemoryItem("loader: windows, batches ahead", loader_bytes(work), host=accelerator),
        MemoryItem("checkpoint: copy while written", sum(map(state_bytes, work.members)), host=accelerator),
    ]


def state_bytes(work: Workload) -> float:
    """Bytes of one dictionary's state on one rank: weights, moments, counters."""
    return parameter_bytes(work) + moment_bytes(work) + 8 * work.latents


def parameter_bytes(work: Workload) -> float:
    """Bytes of the matrices in their format, and of the vectors in fp32."""
    each = {"float32": 4, "bfloat16_stochastic": 2}[work.state.parameters]
    sizes = Sizes(work.latents, work.d_model, work.d_model)
    learned = [spec for spec in work.sae.tensors if spec.role == "learned"]
    return sum((each if len(spec.dims) == 2 else 4) * spec.size(sizes) for spec in learned)


def moment_bytes(work: Workload) -> float:
    """Bytes of the moments. float32: two numbers an element; int8: two codes, and scales; factored: see row_state.

    The moments of vectors are always fp32.
    """
    coded = work.d_model + 4 * (work.d_model // block_of(work.d_model))
    row, column = {
        "float32": (8 * work.d_model, 0), "int8": (2 * coded, 0), "factored": (coded + 4, 4 * work.d_model)
    }[work.state.moments]  # fmt: skip
    return 2 * (row * work.latents + column) + 8 * ((1 + work.vectors) * work.latents + work.d_model)


def copy_bytes(work: Workload, machine: Holding) -> float:
    """Bytes of W_enc's copy in bf16, of an even number of dimensions, which kernels read unless W_enc itself is so."""
    padded = work.d_model + work.d_model % 2
    is_itself = work.state.parameters == "bfloat16_stochastic" and padded == work.d_model
    return 0 if work.kernels(machine.backend) == "torch" or is_itself else 2 * work.latents * padded


def step_bytes(work: Workload, machine: Holding) -> tuple[float, float]:
    """For one dictionary: bytes that live until its update ends, and bytes of the largest phase beside them."""
    d, batch, rows, k, kernels = work.d_model, work.batch, work.rows, work.k, work.kernels(machine.backend)
    width = places = k  # candidates a row, and places that what is chosen of them takes
    if work.in_lines:
        width, places = min(initial_width(k, work.feature), work.latents), LINE_WIDTH * k
    read, scaled, errors = 2 * batch * d, 4 * batch * d, 4 * batch * d
    exchange = candidate_bytes(work) + (3 * 4 * rows * d if work.ranks > 1 else 0)
    after = errors + (4 * rows * d if work.data > 1 else 0)  # the loss's squares, and the errors of this rank's rows
    if work.in_lines:
        # errors and rows in lines: copies, once one is full
        after += (4 if kernels == "torch" else 2) * batch * d
    elif work.ranks == 1:
        after = 0  # one fused step
    if isinstance(work.sae, Elementwise):  # autograd's tensors of a number a pair
        after += 4 * (OF_A_PAIR + 3 * work.vectors) * batch * places
    if isinstance(work.sae, Nested):  # errors of every reconstruction, their sums, and those of all data ranks
        after += 4 * len(work.sae.nesting.weights) * (2 * rows + batch) * d
    match kernels:
        case "torch":
            rounded, pairs = 4 * batch * d, 24 * batch * k // work.feature
            select = scaled + rows * (TILE + width) * KEYS + 6 * TILE * d
            held = read + rounded + errors + pairs  # the update itself goes a block of latents at a time
            chosen = 16 * batch * places  # value, index, d loss / dz
            return held, max(select - errors, scaled + exchange - errors, scaled + after + chosen)
        case "cpu":
            room = width + max(width, 64)
            buffers = 2 * rows * d + 8 * rows * room + 12 * batch * places + 16 * batch * places
            rounded = 2 * batch * d + (0 if after else 4 * batch * d)  # and fp32 rows in the fused step
            # of b_dec's gradient, and of both matrices' squared gradients in fp64
            partial_sums = (4 + (16 if work.state.moments == "factored" else 0)) * work.latents * d / CHUNK
            return read + scaled + rounded + errors + buffers, max(exchange, after) + 8 * work.latents + partial_sums
        case "triton":  # keys above the bound, 16 k a row; pairs are sorted as (latent, place)
            keys = 8 * 16 * width * rows + 3 * 16 * batch * places
            return read + scaled + 2 * batch * d + errors, keys + max(exchange, after)


def shared_bytes(work: Workload, machine: Holding) -> float:
    """The part of `step_bytes` that all dictionaries share: rows as read, and scaled in fp32."""
    return (2 if work.kernels(machine.backend) == "torch" else 6) * work.batch * work.d_model


def candidate_bytes(work: Workload) -> float:
    """Bytes of the selection: keys of all parts, gathered and in rows; in two rounds 2 k / parts values, then k keys.

    In lines: this part's candidates (value, index, mask and digit), and its pairs, gathered and in lines.
    """
    rows, k, parts = work.rows, work.k, work.feature
    if work.in_lines:
        own = min(initial_width(k, parts), work.latents)
        return max(17 * rows * own, 16 * work.batch * (k // parts + LINE_WIDTH * k))
    if parts == 1:
        return 0
    if pays_two_rounds(k, parts, work.d_model):
        return 2 * 4 * rows * parts * -(-2 * k // parts) + 2 * 8 * rows * k
    return 2 * 8 * rows * k * parts


def loader_bytes(work: Workload) -> float:
    """Open slices of this rank's lanes, and its parts of the batches that wait."""
    readers = min(work.ranks, work.lanes)
    lanes = -(-work.lanes // readers)
    slices = 2 * lanes * work.window * work.slice_rows
    if work.store_rows:
        slices = min(slices, work.store_rows)
    return (slices + work.prefetch * -(-work.batch // readers)) * work.d_model * work.stored_bytes


def _named(amounts: Iterable[tuple[str, float]]) -> list[MemoryItem]:
    """One item per name, in order, with the sum of its bytes."""
    sums: dict[str, float] = {}
    for name, size in amounts:
        sums[name] = sums.get(name, 0.0) + size
    return [MemoryItem(name, size) for name, size in sums.items()]

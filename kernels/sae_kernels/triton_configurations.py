"""Every kernel in every block configuration that the host code can choose, as the compiler wants it.

A configuration is a kernel's constants, its launch, and what its pointers point to; tests/sae_kernels hold the list
against what is launched. Left out, since it only multiplies an address: the capacity in `encode` and `rank`. Integers
are compiled as any number, or as a multiple of 16 where '!' says that they usually are one, as d_model is.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from sae_kernels import (
    triton_latents,
    triton_rescan,
    triton_select,
    triton_sparse_decode,
    triton_sparse_gradient,
    triton_topk_encode,
)
from sae_kernels.triton_tiles import GROUP_ROWS, LANES, SINGLE, TILES, UNEVEN, Tile, with_thresholds

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)  # k up to 16, 32, 64, 128, 256 or 1024, 512 or 2048
SIZES = tuple(1 << power for power in range(14))  # k up to what is ranked, or d_model up to 8,192, as a power of two


class Configuration(NamedTuple):
    """One kernel with its argument types, its constants, which arguments are multiples of 16, and the launch."""

    name: str  # after a '/' what sets it apart from the usual one of its block shape
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    options: Mapping[str, Any]


def _configuration(
    name: str, kernel: Any, types: str, *, warps: int, stages: int | None = None, **constants: Any
) -> Configuration:
    """`types` is 'argument:type ...'; a '!' marks a value that is a multiple of 16, as pointers are."""
    pairs = dict(pair.split(":") for pair in types.split())
    aligned = frozenset(n for n, t in pairs.items() if t[0] in "!*")
    plain = {n: t.lstrip("!") for n, t in pairs.items()}
    options = {"num_warps": warps} | ({"num_stages": stages} if stages else {})  # else the default, as at the launch
    return Configuration(name, kernel, plain, constants, aligned, options)


def encode(name: str, tile: Tile, *, dtype: str = "bf16", theta: bool = False, even: bool = True,
           aligned: bool = True, bulk: bool = False, capacity: int = 512) -> Configuration:  # fmt: skip
    """The encoder product with its selecting epilogue in one tile shape; `aligned`: d_model is a multiple of 16."""
    x, W = (f"tensordesc<{dtype}[{rows},{tile.depth}]>" if bulk else f"*{dtype}" for rows in (tile.rows, tile.latents))
    return _configuration(
        name, triton_topk_encode._encode_kernel,
        f"x_ptr:{x} W_ptr:{W} b_ptr:*fp32 theta_ptr:*fp32 least_ptr:*fp32 before_ptr:*i32 "
        "keys_ptr:*i64 count_ptr:*i32 batch:i32 n_latents:i32 leads:i32 spread:i32 start:i32 stop:i32 "
        + ("d_model:!i32 x_stride:!i32 W_stride:!i32" if aligned else "d_model:i32 x_stride:i32 W_stride:i32"),
        warps=tile.warps, stages=tile.stages, CAPACITY=capacity, HAS_THETA=theta, EVEN=even,
        PRECISION="ieee" if dtype == "fp32" else "tf32", BULK=bulk, RESIDENT=bulk and tile.resident > 0,
        ROWS=tile.rows, LATENTS=tile.latents, DEPTH=tile.depth, FRAGMENTS=tile.fragments, LANES=LANES,
        GROUP=GROUP_ROWS,
    )  # fmt: skip


def configurations(target: str) -> Iterator[Configuration]:
    """All that can be chosen on `target` for k up to 2,048 and d_model up to 8,192; what a step takes comes first."""
    yield from _encodes(target)
    yield from _selections()
    for depth in sorted({triton_sparse_decode.blocks_for(d_model)[1] for d_model in SIZES}):
        yield from _gathers(depth)
    for d_model in SIZES:
        yield from _updates(d_model)


def _encodes(target: str) -> Iterator[Configuration]:
    for theta, end in ((False, ""), (True, "-theta")):
        tile, uneven = (with_thresholds(t, target) if theta else t for t in (TILES[target], UNEVEN))
        yield encode(f"encode{end}", tile, bulk=tile.bulk, theta=theta)
        if tile.bulk:
            yield encode(f"encode-gathered{end}", tile, theta=theta)  # n_latents is no multiple of the tile's
        if tile.resident:  # d_model above RESIDENT_UP_TO
            yield encode(f"encode-long{end}", tile._replace(resident=0), bulk=tile.bulk, theta=theta)
        yield encode(f"encode-uneven{end}", uneven, even=False, aligned=False, theta=theta)
        yield encode(f"encode-uneven{end}/16", uneven, even=False, theta=theta)  # d_model is a multiple of 16, or of 32
        if tile.depth > uneven.depth:
            yield encode(f"encode-uneven{end}/32", uneven, theta=theta)
        yield encode(f"encode-fp32{end}", SINGLE, dtype="fp32", theta=theta)
        yield encode(f"encode-fp32{end}/16", SINGLE, dtype="fp32", even=False, theta=theta)
        yield encode(f"encode-fp32{end}/uneven", SINGLE, dtype="fp32", even=False, aligned=False, theta=theta)


def _selections() -> Iterator[Configuration]:
    for capacity in CAPACITIES:
        yield _configuration(
            f"tighten-{capacity}", triton_select._tighten_kernel,
            "keys_ptr:*i64 count_ptr:*i32 least_ptr:*fp32 before_ptr:*i32 overflow_ptr:*i32 k:i32",
            warps=triton_select.warps_for(capacity), CAPACITY=capacity,
        )  # fmt: skip
        for dtype, theta in product(("bf16", "fp32"), (False, True)):
            yield _configuration(
                _name(f"rescan-{capacity}", fp32=dtype == "fp32", theta=theta), triton_rescan._rescan_kernel,
                f"x_ptr:*{dtype} W_ptr:*{dtype} b_ptr:*fp32 theta_ptr:*fp32 keys_ptr:*i64 count_ptr:*i32 "
                "overflow_ptr:*i32 n_latents:!i32 d_model:!i32 x_stride:!i32 W_stride:!i32 k:i32",
                warps=triton_rescan.rescan_warps(capacity), stages=1, CAPACITY=capacity, HAS_THETA=theta,
                LATENTS=triton_rescan._LATENTS, DEPTH=triton_rescan._DEPTH,
            )  # fmt: skip
    for size in SIZES:
        if size <= triton_select.RANKED_IN_KERNEL:
            yield _configuration(
                f"rank-{size}", triton_select._rank_kernel,
                "keys_ptr:*i64 count_ptr:*i32 values_ptr:*fp32 indices_ptr:*i64 k:i32",
                warps=triton_select.rank_warps(size), CAPACITY=triton_topk_encode.capacity_for(size), K=size,
            )  # fmt: skip


def _gathers(depth: int) -> Iterator[Configuration]:
    """What takes blocks of `depth` dimensions."""
    places, _ = triton_sparse_decode.blocks_for(depth)
    pairs, _ = triton_sparse_gradient.blocks_for(depth)
    for bias, residual, dtype in (
        (True, True, "fp32"), (False, True, "fp32"), (False, False, "fp32"), (False, False, "bf16"),
        (True, False, "fp32"), (True, False, "bf16"),
    ):  # fmt: skip
        yield _configuration(
            _name(f"decode-{depth}", bf16=dtype == "bf16", unbiased=not bias, sum=not residual),
            triton_sparse_decode._decode_kernel,
            f"values_ptr:*fp32 indices_ptr:*i64 W_ptr:*{dtype} b_ptr:*fp32 minus_ptr:*fp32 out_ptr:*fp32 k:!i32 "
            "d_model:!i32 W_stride:!i32 minus_stride:!i32",
            warps=4, PLACES=places, DEPTH=depth, HAS_BIAS=bias, RESIDUAL=residual,
        )  # fmt: skip
    for source, dtype in ((False, "fp32"), (False, "bf16"), (True, "fp32")):
        yield _configuration(
            _name(f"gather-dot-{depth}", bf16=dtype == "bf16", source=source), triton_sparse_decode._gather_dot_kernel,
            f"e_ptr:*fp32 W_ptr:*{dtype} indices_ptr:*i64 source_ptr:*{'i32' if source else 'i64'} out_ptr:*fp32 "
            "scale:fp32 k:!i32 d_model:!i32 e_stride:!i32 W_stride:!i32",
            warps=4, PLACES=places, DEPTH=depth, SOURCE=source,
        )  # fmt: skip
    for sums, dtype, source in ((True, "bf16", False), (True, "fp32", False), (False, "fp32", False),
                                (False, "fp32", True)):  # fmt: skip
        yield _configuration(
            _name(f"gradient-{depth}", fp32=dtype == "fp32", rows=not sums, source=source),
            triton_sparse_gradient._gradient_kernel,
            f"rows_ptr:*{dtype} weights_ptr:*fp32 pairs_ptr:*i32 offsets_ptr:*i32 source_ptr:*i32 out_ptr:*fp32 "
            "sum_ptr:*fp32 k:!i32 d_model:!i32 stride:!i32",
            warps=4, SOURCE=source, PAIRS=pairs, DEPTH=depth, HAS_SUM=sums,
        )  # fmt: skip


def _updates(d_model: int) -> Iterator[Configuration]:
    warps = triton_latents.warps_for(d_model)
    aligned = "!" if d_model >= 16 else ""
    types = (
        "p_ptr:*fp32 m_ptr:*fp32 v_ptr:*fp32 rounded_ptr:*bf16 gradient_ptr:*fp32 norm_ptr:*fp32 bias_ptr:*fp32 "
        "bias_m_ptr:*fp32 bias_v_ptr:*fp32 bias_gradient_ptr:*fp32 slots_ptr:*i32 extra_ptr:*fp32 "
        "extra_bias_ptr:*fp32 rows_ptr:*{} weights_ptr:*fp32 pairs_ptr:*i32 "
        "offsets_ptr:*i32 source_ptr:*i32 linear_ptr:*fp32 row_ptr:*fp32 schedule_ptr:*fp32 step:i32 beta2:fp32 "
        f"eps:fp32 k:i32 d_model:{aligned}i32 row_stride:{aligned}i32"
    )
    for parameter, source in (
        ("encoder", ""), ("encoder", "extra"), ("encoder", "dense"),
        ("decoder", ""), ("decoder", "extra"), ("decoder", "source"), ("decoder", "dense"), ("b_dec", "dense"),
        ("encoder", "linear"), ("free decoder", "linear"), ("free decoder", "dense"),
    ):  # fmt: skip
        encoder, dense = parameter == "encoder", source == "dense"
        matrix = parameter.removeprefix("free ")  # free: its rows have any norm
        linear = ("row" if encoder else "own") if source == "linear" else ""
        yield _configuration(
            _name(f"update-{matrix}-{d_model}", free=matrix != parameter, **({source: True} if source else {})),
            triton_latents._update_kernel, types.format("bf16" if encoder and not dense else "fp32"), warps=warps,
            SOURCE=source == "source", DENSE=dense, UNIT=parameter == "decoder", ROUND=encoder, BIAS=encoder,
            EXTRA=source == "extra", LINEAR=linear, SITES=1, PAIRS=triton_latents.PAIRS, DEPTH=d_model,
        )  # fmt: skip


def _name(shape: str, **differences: bool) -> str:
    return "/".join([shape, *(name for name, differs in differences.items() if differs)])

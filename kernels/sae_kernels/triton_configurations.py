"""Every kernel in every block configuration that the host code can choose, as the compiler wants it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sae_kernels import (
    triton_latents,
    triton_rescan,
    triton_select,
    triton_sparse_decode,
    triton_sparse_gradient,
    triton_topk_encode,
)
from sae_kernels.triton_tiles import GROUP_ROWS, LANES, SINGLE, TILES, UNEVEN, Tile, power_of_two

CAPACITIES = (256, 512, 1024, 2048, 4096, 8192)  # k up to 16, 32, 64, 128, 256 or 1024, 512 or 2048
WIDTHS = (128, 256, 512, 768, 2048, 4096, 8192)  # d_model, rounded up to a power of two


class Configuration(NamedTuple):
    """One kernel with its argument types, its constants, which arguments are multiples of 16, and the launch."""

    name: str
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
           bulk: bool = False, capacity: int = 512) -> Configuration:  # fmt: skip
    """The encoder product with its selecting epilogue in one tile shape."""
    x, W = (f"tensordesc<{dtype}[{rows},{tile.depth}]>" if bulk else f"*{dtype}" for rows in (tile.rows, tile.latents))
    return _configuration(
        name, triton_topk_encode._encode_kernel,
        f"x_ptr:{x} W_ptr:{W} b_ptr:*fp32 theta_ptr:*fp32 least_ptr:*fp32 before_ptr:*i32 "
        "keys_ptr:*i64 count_ptr:*i32 batch:i32 n_latents:i32 leads:i32 spread:i32 start:i32 stop:i32 "
        + ("d_model:!i32 x_stride:!i32 W_stride:!i32" if even else "d_model:i32 x_stride:i32 W_stride:i32"),
        warps=tile.warps, stages=tile.stages, CAPACITY=capacity, HAS_THETA=theta, EVEN=even,
        PRECISION="ieee" if dtype == "fp32" else "tf32", BULK=bulk, RESIDENT=bulk and tile.resident > 0,
        ROWS=tile.rows, LATENTS=tile.latents, DEPTH=tile.depth, FRAGMENTS=tile.fragments, LANES=LANES,
        GROUP=GROUP_ROWS,
    )  # fmt: skip


def configurations(target: str) -> Iterator[Configuration]:
    """All configurations that can be chosen on `target`; the default of each kernel comes first."""
    tile = TILES[target]
    yield encode("encode", tile, bulk=tile.bulk)
    yield encode("encode-theta", tile, bulk=tile.bulk, theta=True)
    if tile.bulk:
        yield encode("encode-gathered", tile)  # n_latents is no multiple of the tile's
    if tile.resident:
        yield encode("encode-long", tile._replace(resident=0), bulk=tile.bulk)  # d_model above RESIDENT_UP_TO
    yield encode("encode-uneven", UNEVEN, even=False)
    yield encode("encode-fp32", SINGLE, dtype="fp32", even=False)
    for capacity in CAPACITIES:
        warps = triton_select.warps_for(capacity)
        yield _configuration(
            f"tighten-{capacity}", triton_select._tighten_kernel,
            "keys_ptr:*i64 count_ptr:*i32 least_ptr:*fp32 before_ptr:*i32 overflow_ptr:*i32 k:i32",
            warps=warps, CAPACITY=capacity,
        )  # fmt: skip
        yield _configuration(
            f"rescan-{capacity}", triton_rescan._rescan_kernel,
            "x_ptr:*bf16 W_ptr:*bf16 b_ptr:*fp32 theta_ptr:*fp32 keys_ptr:*i64 count_ptr:*i32 overflow_ptr:*i32 "
            "n_latents:!i32 d_model:!i32 x_stride:!i32 W_stride:!i32 k:i32",
            warps=triton_rescan.rescan_warps(capacity), stages=1, CAPACITY=capacity, HAS_THETA=False,
            LATENTS=triton_rescan._LATENTS, DEPTH=triton_rescan._DEPTH,
        )  # fmt: skip
    for k in (32, 64, 128):
        yield _configuration(
            f"rank-{k}", triton_select._rank_kernel, 
            "keys_ptr:*i64 count_ptr:*i32 values_ptr:*fp32 indices_ptr:*i64 k:i32",
            warps=1 if k <= 32 else 4, CAPACITY=512, K=k,
        )  # fmt: skip
    yield from _gathers()
    for d_model in WIDTHS:
        yield from _updates(d_model)


def _gathers() -> Iterator[Configuration]:
    for d_model in (128, 768):  # blocks of 128 and, from d_model 512 on, of 512 dimensions
        places, depth = triton_sparse_decode.blocks_for(d_model)
        pairs, _ = triton_sparse_gradient.blocks_for(d_model)
        yield _configuration(
            f"decode-{depth}", triton_sparse_decode._decode_kernel,
            "values_ptr:*fp32 indices_ptr:*i64 W_ptr:*fp32 b_ptr:*fp32 minus_ptr:*fp32 out_ptr:*fp32 k:!i32 "
            "d_model:!i32 W_stride:!i32 minus_stride:!i32",
            warps=4, PLACES=places, DEPTH=depth, HAS_BIAS=True, RESIDUAL=True,
        )  # fmt: skip
        yield _configuration(
            f"gather-dot-{depth}", triton_sparse_decode._gather_dot_kernel,
            "e_ptr:*fp32 W_ptr:*fp32 indices_ptr:*i64 where_ptr:*fp32 out_ptr:*fp32 scale:fp32 k:!i32 d_model:!i32 "
            "e_stride:!i32 W_stride:!i32",
            warps=4, PLACES=places, DEPTH=depth, WHERE=True,
        )  # fmt: skip
        yield _configuration(
            f"gradient-{depth}", triton_sparse_gradient._gradient_kernel,
            "rows_ptr:*bf16 weights_ptr:*fp32 pairs_ptr:*i32 offsets_ptr:*i32 out_ptr:*fp32 sum_ptr:*fp32 k:!i32 "
            "split:!i32 shift:!i32 d_model:!i32 stride:!i32",
            warps=4, PAIRS=pairs, DEPTH=depth, HAS_SUM=True,
        )  # fmt: skip
        yield _configuration(
            f"gradient-atomic-{depth}", triton_sparse_gradient._scatter_kernel,
            "rows_ptr:*bf16 weights_ptr:*fp32 indices_ptr:*i64 out_ptr:*fp32 k:!i32 d_model:!i32 stride:!i32",
            warps=4, DEPTH=depth,
        )  # fmt: skip


def _updates(d_model: int) -> Iterator[Configuration]:
    depth, warps = power_of_two(d_model), triton_latents.warps_for(d_model)
    types = (
        "p_ptr:*fp32 m_ptr:*fp32 v_ptr:*fp32 rounded_ptr:*bf16 gradient_ptr:*fp32 norm_ptr:*fp32 bias_ptr:*fp32 "
        "bias_m_ptr:*fp32 bias_v_ptr:*fp32 bias_gradient_ptr:*fp32 slots_ptr:*i32 extra_ptr:*fp32 "
        "extra_bias_ptr:*fp32 rows_ptr:*{} weights_ptr:*fp32 pairs_ptr:*i32 "
        "offsets_ptr:*i32 done_ptr:*i32 schedule_ptr:*fp32 step:i32 beta2:fp32 eps:fp32 k:i32 split:i32 "
        "shift:!i32 d_model:!i32 row_stride:!i32"
    )
    for name, rows, dense, encoder, lazy in (
        ("encoder", "bf16", False, True, False),
        ("decoder", "fp32", False, False, False),
        ("decoder-lazy", "fp32", False, False, True),
        ("decoder-dense", "fp32", True, False, False),
    ):
        yield _configuration(
            f"update-{name}-{depth}", triton_latents._update_kernel, types.format(rows),
            warps=warps, DENSE=dense, UNIT=not encoder, ROUND=encoder, BIAS=encoder, LAZY=lazy,
            EXTRA=not lazy and not dense,
            PAIRS=triton_latents.PAIRS, DEPTH=depth,
        )  # fmt: skip
    yield _configuration(
        f"catch-up-{depth}", triton_latents._catch_up_kernel,
        "p_ptr:*fp32 m_ptr:*fp32 v_ptr:*fp32 offsets_ptr:*i32 done_ptr:*i32 schedule_ptr:*fp32 step:i32 "
        "beta2:fp32 eps:fp32 d_model:!i32",
        warps=warps, ALL=False, DEPTH=depth,
    )  # fmt: skip

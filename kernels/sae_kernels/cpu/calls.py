"""The library's functions and structures, as ctypes sees them; sae_cpu.cpp has the other side."""

import ctypes
from typing import get_args

import torch
from torch import Tensor

from sae_kernels.cpu.build import library
from sae_kernels.eight_bit import block_of
from sae_kernels.row_state import Hyper, MomentFormat, RowState


class Adam(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in ("lr", "beta2", "new1", "new2", "eps", "bias1", "bias2", "unbias1", "unbias2")
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("value", "first", "second", "first_scale", "second_scale", "second_row", "profile", "squares")
        ),
        *((name, ctypes.c_long) for name in ("d", "block", "bf16", "moments", "first_latent")),
        ("keys", 3 * ctypes.c_uint64),
    ]


class Tensors(ctypes.Structure):
    _fields_ = [
        ("enc", Matrix), ("dec", Matrix),
        *((name, ctypes.c_void_p) for name in ("bias", "bias_first", "bias_second", "rounded")),
        ("compact", ctypes.c_long),
    ]  # fmt: skip


class Dense(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("slots", "dec", "enc", "bias")]


class Linear(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("enc", "row", "dec")), ("sites", ctypes.c_long)]


class Aux(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("error", "rows", "values", "indices", "W_dec", "places")),
        *((name, ctypes.c_long) for name in ("bf16", "batch", "k", "n_dead", "d", "padded")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("squares", "d_dec", "d_enc", "d_bias")),
    ]


class Chosen(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p), ("indices", ctypes.c_void_p), ("d_z", ctypes.c_void_p),
        ("weights", ctypes.c_void_p), ("source", ctypes.c_void_p),
        ("k", ctypes.c_long), ("first_error", ctypes.c_long), ("scale", ctypes.c_float),
    ]  # fmt: skip


def call(name: str, *arguments: Tensor | int | float | ctypes.Structure | ctypes.Array | None) -> int:
    """The library's function of that name; ctypes lets other Python threads run meanwhile."""
    loaded = library()
    assert loaded is not None
    function = getattr(loaded, name)
    function.restype = ctypes.c_long
    return function(*(_argument(a) for a in arguments))


def _argument(a: Tensor | int | float | ctypes.Structure | ctypes.Array | None) -> object:
    match a:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            assert a.is_contiguous()
            return ctypes.c_void_p(a.data_ptr())
        case int():
            return ctypes.c_long(a)
        case float():
            return ctypes.c_float(a)
        case ctypes.Structure():
            return ctypes.byref(a)
    return a


def adam(hyper: Hyper) -> Adam:
    beta1, beta2 = hyper.betas
    bias1, bias2 = 1 - beta1**hyper.step, 1 - beta2**hyper.step
    return Adam(hyper.lr, beta2, 1 - beta1, 1 - beta2, hyper.eps, bias1, bias2, 1 / bias1, 1 / bias2)


def matrix(rows: RowState, step: int, *, profile: Tensor | None, squares: Tensor | None) -> Matrix:
    """`rows` as they are updated in one step; `profile` and `squares` where second moments are factored."""
    d_model = rows.value.shape[1]
    moments = ("first", "second", "first_scale", "second_scale", "second_row")
    tensors = [rows.value, *(rows.moments.get(name) for name in moments), profile, squares]
    return Matrix(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors), d_model, block_of(d_model),
        is_bf16(rows), get_args(MomentFormat).index(rows.options.moments), rows.first_latent, rows.keys(step),
    )  # fmt: skip


def is_bf16(rows: RowState) -> int:
    return int(rows.value.dtype == torch.bfloat16)

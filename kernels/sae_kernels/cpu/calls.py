"""The library's functions and structures, as ctypes sees them; sae_cpu.cpp has the other side."""

import ctypes

from torch import Tensor

from sae_kernels.cpu.build import library
from sae_kernels.row_state import Hyper


class Adam(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("lr", "beta2", "new1", "new2", "eps", "unbias1", "unbias2")]


class Tensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "enc", "dec", "bias", "enc_first", "dec_first", "bias_first", "enc_second", "dec_second", "bias_second",
            "rounded",
        )
    ]  # fmt: skip


class Dense(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("slots", "dec", "enc", "bias")]


class Linear(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("enc", "row", "dec")), ("sites", ctypes.c_long)]


class Aux(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("error", "rows", "values", "indices", "W_dec", "places")),
        *((name, ctypes.c_long) for name in ("batch", "k", "n_dead", "d", "padded")),
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
    unbias1, unbias2 = 1 / (1 - beta1**hyper.step), 1 / (1 - beta2**hyper.step)
    return Adam(hyper.lr, beta2, 1 - beta1, 1 - beta2, hyper.eps, unbias1, unbias2)

"""The speed of this process on a plain matrix product; utilisation is a share of it."""

import time

import torch

_SIZES = {"cpu": 512, "cuda": 8192}  # a side of the matrices: some milliseconds a product
_PRODUCTS = 5


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products in `dtype`, with this process's threads. Takes about 0.1 s."""
    n = _SIZES.get(device.type, 1024)
    a = torch.ones(n, n, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for a device that works by itself
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * n**3 / fastest

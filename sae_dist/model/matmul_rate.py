"""What this process reaches on a plain matrix product: the measure that utilisation is a share of."""

import time

import torch

_SIZES = {"cpu": 512, "cuda": 8192}  # a side of the matrices: some milliseconds a product
_PRODUCTS = 5


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products in `dtype`, with the threads that this process may use.

    A measure, not a data sheet: it holds for a share of a processor too. Takes some 0.1 s.
    """
    n = _SIZES.get(device.type, 1024)
    a = torch.ones(n, n, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for a device that works by itself
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * n**3 / fastest

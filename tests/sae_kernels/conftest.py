"""Triton kernels in tests: natively on a GPU, else interpreted on CPU tensors with bf16 products put right."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret, "Triton was imported before tests/conftest.py chose the interpreter"
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _bf16_products():
    """The interpreter holds bf16 as 16-bit integers and would multiply those; widen the operands of a product."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = create_dot
    yield
    interpreter.InterpreterBuilder.create_dot = original

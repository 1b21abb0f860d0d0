"""Triton kernels in tests: natively on a GPU, else interpreted on CPU tensors with bf16 products put right."""

import pytest
import torch
import triton

from tests.sae_kernels.interpreted import bf16_as_on_a_gpu


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret, "Triton was imported before tests/conftest.py chose the interpreter"  # pyright: ignore[reportAttributeAccessIssue]
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _bf16_as_on_a_gpu():
    with bf16_as_on_a_gpu():
        yield

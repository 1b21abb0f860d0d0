"""Shapes in signatures are promises: what breaks them fails, in a test and in the processes that it forks."""

import jaxtyping
import pytest
import torch
from sae_kernels import reference

from sae_dist.evaluate import reconstruction
from tests.processes import PROCESSES


def misshapen() -> str:
    """Which of the promises this process holds its callers to."""
    try:
        reference.unit_norm(torch.ones(3))
    except jaxtyping.TypeCheckError as error:
        return str(error)
    return ""


def test_an_argument_of_another_shape_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"Expected type: .*n_latents d_model"):
        reference.unit_norm(torch.ones(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="batches"):
        reconstruction.reconstruction([], [(torch.ones(3), torch.ones(3))])


def test_so_it_is_in_a_forked_process():
    with PROCESSES.Pool(1) as pool:
        assert "Expected type" in pool.apply(misshapen)

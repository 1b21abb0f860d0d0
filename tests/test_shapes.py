"""Shapes in signatures are promises: what breaks them fails, in a test and in the processes that it forks."""

import re

import jaxtyping
import pytest
import torch
from sae_kernels import reference

from sae_dist.evaluate import reconstruction
from tests.processes import PROCESSES
from tests.shapes import THEN_ONE_IN


def misshapen() -> str:
    """What a wrong shape is told: calls are checked by sampling, so as many as one sample covers are made."""
    for _ in range(THEN_ONE_IN):
        try:
            reference.unit_norm(torch.ones(3))
        except jaxtyping.TypeCheckError as error:
            return str(error)
    return ""


def test_an_argument_of_another_shape_is_refused():
    assert re.search(r"Expected type: .*n_latents d_model", misshapen())
    with pytest.raises(jaxtyping.TypeCheckError, match="batches"):
        reconstruction.reconstruction([], [(torch.ones(3), torch.ones(3))])


def test_so_it_is_in_a_forked_process():
    with PROCESSES.Pool(1) as pool:
        assert "Expected type" in pool.apply(misshapen)

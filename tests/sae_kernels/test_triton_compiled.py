"""The kernels as compiled code: no spills, shared memory that the processor has, the instructions that are claimed."""

import json
import os
import subprocess
import sys

import pytest

PRODUCT = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program may have
DEFAULTS = ("encode", "tighten-512", "rank-32", "decode-512", "gather-dot-512", "gradient-512", "update-encoder-1024",
            "update-decoder-1024")  # fmt: skip
SPILLS = {
    ("sm_100", "rescan-8192"),  # k above 1,024: 16 bytes in a kernel that a row in 10^15 needs
    ("sm_90", "rescan-1024/fp32"),  # 8 bytes there too
    ("sm_90", "gather-dot-512/source"),  # 8 bytes, of dictionaries that rebuild another hook point
    ("sm_90", "update-encoder-2048/linear"),  # 8 bytes, of kinds whose silent latents pay
}


def compiled(target, names, cache):
    """Compile in a process of its own: the interpreter, which the other tests use, and the compiler do not mix."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "sae_kernels.triton_compiled", target, *names],
        env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(target, kernels):
    for kernel in kernels:
        known = any(kernel["name"].startswith(name) for at, name in SPILLS if at == target)
        assert kernel["spills"] == 0 or known, kernel
        assert kernel["shared"] <= SHARED[target], kernel
        if kernel["name"].startswith("encode") and "fp32" not in kernel["name"]:
            assert PRODUCT[target] in kernel["instructions"], kernel
            assert "atomic" in kernel["instructions"], kernel
        kind, _, width = kernel["name"].split("/")[0].rpartition("-")
        if kind.startswith(("decode", "gather", "gradient", "update")) and "atomic" not in kind and int(width) >= 128:
            assert "load128" in kernel["instructions"], kernel  # 16 bytes a thread and load
        if kernel["name"] == "encode" and target != "gfx942":
            assert "cp.async" in kernel["instructions"], kernel  # the next operands arrive during the product


@pytest.mark.slow
@pytest.mark.parametrize("target", PRODUCT)
def test_default_configurations_do_not_spill_and_use_the_matrix_units(target, tmp_path):
    kernels = compiled(target, [f"{name}$" for name in DEFAULTS], tmp_path)
    assert {kernel["name"] for kernel in kernels} == set(DEFAULTS)
    check(target, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("target", PRODUCT)
def test_every_configuration_that_can_be_chosen_compiles_without_spills(target, tmp_path):
    kernels = compiled(target, [], tmp_path)
    assert len(kernels) > 200
    check(target, kernels)

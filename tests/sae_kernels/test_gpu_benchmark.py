import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str, annotations: bool) -> subprocess.CompletedProcess[str]:
    """The script, with jaxtyping or as on a machine that has torch and nothing else."""
    block = "" if annotations else "sys.modules['jaxtyping'] = None;"
    program = (
        f"import runpy, sys; {block} sys.path.insert(0, 'benchmarks'); sys.argv = {['gpu.py', *arguments]!r}; "
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("annotations", [True, False])
def test_the_gpu_benchmark_runs_whole_at_toy_sizes_with_and_without_jaxtyping(tmp_path, annotations):
    out = tmp_path / "gpu.json"
    run = benchmark("--tiny", "--out", str(out), annotations=annotations)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert set(result["checks"].values()) == {"ok"}
    names = {figure["name"] for figure in result["figures"]}
    assert {"encode", "bare product", "decode", "row_gradient", "update from pairs", "step triton, 0 dead"} <= names
    assert all(figure["ms"] > 0 for figure in result["figures"])


@pytest.mark.parametrize("annotations", [True, False])
def test_the_gpu_benchmark_refuses_real_sizes_without_a_gpu(tmp_path, annotations):
    run = benchmark("--out", str(tmp_path / "gpu.json"), annotations=annotations)
    assert run.returncode == 2 and "no GPU here" in run.stderr, run.stderr

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("annotations", [True, False])
def test_the_gpu_benchmark_runs_whole_at_toy_sizes_with_and_without_jaxtyping(tmp_path, annotations):
    out = tmp_path / "gpu.json"
    block = "" if annotations else "sys.modules['jaxtyping'] = None;"
    program = (
        f"import runpy, sys; {block} sys.path.insert(0, 'benchmarks'); "
        f"sys.argv = ['gpu.py', '--tiny', '--out', {str(out)!r}]; "
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert set(result["checks"].values()) == {"ok"}
    names = {figure["name"] for figure in result["figures"]}
    assert {"encode", "bare product", "decode", "row_gradient", "update from pairs", "step triton, 0 dead"} <= names
    assert all(figure["ms"] > 0 for figure in result["figures"])


def test_the_gpu_benchmark_refuses_real_sizes_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "gpu.json")],
        cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "kernels", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 2 and "no GPU here" in run.stderr

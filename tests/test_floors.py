"""The floors of the house: a module imports its own package and packages on lower floors, nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # lowest first; packages on one floor do not know each other
    {"sae_kernels"},
    {"config"},
    {"faults", "allocator", "cache_folder", "checksums", "locks", "network", "parallel", "system_errors"},
    {"storage", "monitor", "run_files"},
    {"text", "model", "shards", "sae"},
    {"harvest", "train", "evaluate", "interpret"},
    {"plan", "sweep"},
    {"service"},
    {"cli"},
    {"__main__"},
)
ONLY_IN = {  # a heavy dependency has one home
    "triton": "kernels/sae_kernels/",
    "torch.distributed": "parallel",  # parallel.py, or a package parallel/
    "ray": "sae_dist/service/",
    "wandb": "sae_dist/monitor/",
    "tensorboardX": "sae_dist/monitor/",
    "prometheus_client": "sae_dist/monitor/",
    "hydra": "sae_dist/cli/",
    "altair": "sae_dist/sweep/",
    "scipy": "sae_dist/sweep/",
    "s3fs": "sae_dist/storage/",
    "transformers": "sae_dist/model/",
    "vllm": "sae_dist/model/vllm.py",
    "datasets": "sae_dist/text/",
}
SOURCES = sorted((ROOT / "sae_dist").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def house(module: str) -> str:
    """The package or module of ours that a dotted name belongs to: 'sae_dist.train.step' -> 'train'."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sae_dist" and len(parts) > 1 else parts[0]


def floor(name: str) -> int | None:
    return next((level for level, names in enumerate(FLOORS) if name in names), None)


def imports(source: str) -> set[str]:
    """Every module that the source imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: relative import; write the full name")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_home(relative: Path, place: str) -> bool:
    """Whether a file lies at a dependency's home: a path's beginning, or any file or folder named `parallel`."""
    return place in relative.with_suffix("").parts if "/" not in place and "." not in place else place in str(relative)


def violations(relative: Path, source: str) -> list[str]:
    """What the file at `relative` imports and may not."""
    home = house(".".join(relative.with_suffix("").parts[relative.parts[0] == "kernels" :]))
    found = []
    for name in sorted(imports(source)):
        target = house(name)
        above, here = floor(target), floor(home)
        if above is not None and target != home and (here is None or above >= here):
            found.append(f"{relative} imports {name}, which is not on a lower floor")
        found += [
            f"{relative} imports {name}; only {place} may"
            for dependency, place in ONLY_IN.items()
            if (name == dependency or name.startswith(f"{dependency}.")) and not _is_home(relative, place)
        ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_downwards(path: Path):
    assert not violations(path.relative_to(ROOT), path.read_text())


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("sae_dist/sae/bad.py", "from sae_dist.train import step"),
        ("sae_dist/harvest/bad.py", "def f():\n    import ray"),
        ("sae_dist/text/bad.py", "import sae_dist.model.load"),
        ("kernels/sae_kernels/bad.py", "from sae_dist import config"),
        ("sae_dist/train/bad.py", "import torch.distributed as dist"),
    ],
)
def test_the_check_can_fail(path: str, line: str):
    assert violations(Path(path), line)

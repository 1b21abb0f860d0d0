"""The floors of the house: a module imports its own package and packages on lower floors, and nothing happens then."""

import ast
from functools import cache
from pathlib import Path

import pytest

from sae_dist.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
FLOORS = (  # lowest first; packages on one floor do not know each other
    {"sae_kernels"},
    {"config", "exit_codes"},
    {"faults", "allocator", "cache_folder", "checksums", "locks", "network", "parallel", "progress", "system_errors"},
    {"storage", "monitor", "run_files", "hub", "public_names"},
    {"text", "model", "shards", "sae"},
    {"harvest", "train", "evaluate", "interpret", "formats"},
    {"plan", "sweep", "steer", "label", "comparison", "dashboards"},
    {"service"},
    {"cli"},
    {"api"},
    {"__init__", "__main__"},
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
    "neuronpedia": "sae_dist/dashboards/",
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


def run_by_import(source: str) -> list[ast.AST]:
    """The nodes that importing the module runs: all but the bodies of its functions."""
    found: list[ast.AST] = []
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


@cache
def imported(module: str) -> set[str]:
    """What importing a module of ours imports at once; nothing for a module of others."""
    path = ROOT / module.replace(".", "/")
    source = next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.exists()), None)
    found = set()
    for node in run_by_import(source.read_text()) if source else []:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:  # `from a import b`: a, and perhaps a.b
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def loaded_with(module: str) -> set[str]:
    """Every module that importing `module` imports, directly or through modules of ours."""
    found, pending = set(), [module]
    while pending:
        new = imported(pending.pop()) - found
        pending += [name for name in new if name.startswith("sae_dist.")]
        found |= new
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_loads_the_library_of_language_models_to_read_its_words(command: str):
    assert not {name for name in loaded_with(f"sae_dist.cli.{command}") if name.split(".")[0] == "transformers"}


def test_which_modules_are_loaded_is_found():
    assert {"transformers", "ray", "sae_dist.model.load"} <= loaded_with("sae_dist.service.run_job")


CHANGES = {"setdefault", "update", "pop", "clear", "putenv", "unsetenv"}


def environment_changes(source: str) -> list[int]:
    """Lines on which importing the module changes environment variables."""
    if "environ" not in source and "putenv" not in source:
        return []
    return [
        node.lineno
        for node in run_by_import(source)
        if (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES)
        or isinstance(node, ast.AugAssign)
        if "os.environ" in (said := ast.unparse(node)) or "os.putenv" in said
    ]


def test_importing_a_module_changes_no_environment():
    """Child processes would inherit it: `ray start` in one of them, for instance."""
    found = {str(path.relative_to(ROOT)): environment_changes(path.read_text()) for path in SOURCES}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['A'] = '1'", "import os\nif True:\n    os.environ.setdefault('A', '1')",
     "import os\nclass C:\n    os.environ |= {'A': '1'}", "import os\ndel os.environ['A']"],
)  # fmt: skip
def test_a_changed_environment_is_found(source: str):
    assert environment_changes(source)
    assert not environment_changes(f"def f():\n    {source.replace(chr(10), chr(10) + '    ')}")

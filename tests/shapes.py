"""The shapes that signatures promise, checked at every call: conftest.py hands this to jaxtyping's import hook."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import beartype
from jaxtyping import AbstractArray

ROOT = Path(__file__).parents[1]
UNCHECKED = (
    "sae_kernels",  # a package's name would stand for all of its modules, Triton's kernels too
    "sae_kernels.triton_ops",  # torch.compile cannot follow the check
)


def modules_with_shapes() -> list[str]:
    """Our modules whose signatures name shapes."""
    sources = ((root, path) for root in (ROOT, ROOT / "kernels") for path in sorted(root.glob("sae_*/**/*.py")))
    named = (
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for root, path in sources
        if "from jaxtyping import" in path.read_text()
    )
    return [name for name in named if name not in UNCHECKED]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and results that are arrays; of all others pyright knows the types."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _has_shape(hint)}
    return beartype.beartype(function) if function.__annotations__ else function


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))

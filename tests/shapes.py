"""The shapes that signatures promise, checked while tests run: conftest.py calls `install` before it imports ours.

A check takes some 100 microseconds, as long as a step of a tiny dictionary. Checking every call would double the time
of the tests, so a function that is called often is checked in its first calls and in every so many of the others.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, get_args

import beartype
import jaxtyping
from jaxtyping import AbstractArray

ROOT = Path(__file__).parents[1]
ALL_OF_THE_FIRST, THEN_ONE_IN = 50, 50  # calls of one function
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


def install() -> None:
    """Makes jaxtyping's import hook check our modules, and by sampling."""
    jaxtyping.jaxtyped = functools.partial(_decorator, jaxtyped=jaxtyping.jaxtyped)  # what the hook puts on functions
    jaxtyping.install_import_hook(modules_with_shapes(), "tests.shapes.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and results that are arrays; of all others pyright knows the types."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _has_shape(hint)}
    return beartype.beartype(function) if function.__annotations__ else function


def _decorator(*, typechecker: Any, jaxtyped: Callable[..., Any]) -> Callable[[Any], Any]:
    def decorate(target: Any) -> Any:
        if not isinstance(target, FunctionType):  # a class
            return jaxtyped(target, typechecker=typechecker)
        if not any(map(_has_shape, target.__annotations__.values())):
            return target
        return sampled(target, jaxtyped(target, typechecker=typechecker))

    return decorate


def sampled(function: Callable[..., Any], checks: Callable[..., Any]) -> Callable[..., Any]:
    """`checks` in the first calls and in some of the later ones, `function` in the others."""
    calls = itertools.count()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        n = next(calls)
        return (checks if n < ALL_OF_THE_FIRST or n % THEN_ONE_IN == 0 else function)(*args, **kwargs)

    return call


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))

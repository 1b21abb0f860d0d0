"""Files of a repository on this disk: only those that were asked for, each checked by the hash that the Hub lists.

They stay in the cache by commit, so that a second time nothing is fetched. A file that was cut short is continued.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from sae_dist.cache_folder import cache_folder
from sae_dist.config import UserError
from sae_dist.hub.address import Address, is_plain
from sae_dist.hub.errors import REPEAT, one_line
from sae_dist.locks import file_lock

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

PLAIN = (".safetensors", ".json", ".yaml", ".npz")  # files that hold data and no code


class Pulled(NamedTuple):
    """Where the files are now, and where they came from."""

    path: Path  # the folder, or the file if the address was that of one
    address: Address  # with the commit


def pull(address: Address, names: Sequence[str]) -> Pulled:
    """Fetches the files right under `address` that have one of these names, which may be patterns: layer_*.json.

    Where the address is that of a file, it is the only one of its kind. UserError where there are none, or one of them
    could hold code (.pt); each error of the Hub is one too.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if pickled := [name for name in names if PurePosixPath(name).suffix not in PLAIN]:
        raise UserError(
            f"{address}: {pickled[0]} is a kind of file that can hold code, which is not fetched; look at it yourself, "
            f"by `hf download {address.repository}`, and give its folder"
        )
    folder, names = _folder_and_names(address, names)
    with one_line(address):
        api = HfApi()
        commit = api.model_info(address.repository, revision=address.revision).sha or ""
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise UserError(f"{address}: the server gives no commit; check HF_ENDPOINT")
        deep = any("/" in name for name in names)
        listed = list(api.list_repo_tree(address.repository, folder or None, revision=commit, recursive=deep))
    there = _under(folder, (each for each in listed if isinstance(each, RepoFile)))
    wanted = [path for path in there if any(_has_name(path, name) for name in names)]
    if not wanted:
        has = ", ".join(map(repr, sorted(there)[:5])) or "no files"
        raise UserError(f"{address} has no {' or '.join(names)} but {has}; add the folder, or give another format=")
    home = cache_folder() / "hub" / address.repository.replace("/", "--") / commit
    for path in wanted:
        _fetch(address, commit, there[path], home / folder / path)
    return Pulled(home / address.path, address._replace(revision=commit))


def _folder_and_names(address: Address, names: Sequence[str]) -> tuple[str, list[str]]:
    """Where to look and for what; of the address of a file in its folder, and for no other of its kind."""
    path = PurePosixPath(address.path)
    if path.suffix not in PLAIN:
        return address.path, list(names)
    others = [name for name in names if PurePosixPath(name).suffix != path.suffix]
    return "" if path.parent == PurePosixPath() else str(path.parent), [path.name, *others]


def _under(folder: str, listed: "Iterable[RepoFile]") -> "dict[str, RepoFile]":
    """Files by their paths in the folder. A listing is not trusted: what would lead elsewhere is left out."""
    prefix = folder and f"{folder}/"
    return {
        file.path.removeprefix(prefix): file
        for file in listed
        if file.path.startswith(prefix) and is_plain(file.path.removeprefix(prefix))
    }


def _has_name(path: str, name: str) -> bool:
    return path.count("/") == name.count("/") and fnmatchcase(path, name)


def _fetch(address: Address, commit: str, file: "RepoFile", to: Path) -> None:
    """Writes a file of the repository at `to`, whole and with the right hash or not at all."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    to.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(to.with_name(to.name + ".lock"), waiting=f"another process fetches {file.path}"):
        if to.is_file():
            return
        part = to.with_name(to.name + ".part")
        with part.open("ab") as arriving, one_line(address):
            if arriving.tell() > file.size:
                arriving.truncate(0)
            url = hf_hub_url(address.repository, file.path, revision=commit)
            have = arriving.tell()
            http_get(url, arriving, resume_size=have, headers=build_hf_headers(), expected_size=file.size)
        if _digest(part, file) != (file.lfs.sha256 if file.lfs else file.blob_id):
            part.unlink()
            raise UserError(f"{address}: {file.path} arrived damaged; {REPEAT}")
        part.replace(to)


def _digest(path: Path, file: "RepoFile") -> str:
    """The hash by which the Hub knows a large file (SHA-256), or a small one (that of git)."""
    state = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as content:
        while piece := content.read(1 << 22):
            state.update(piece)
    return state.hexdigest()

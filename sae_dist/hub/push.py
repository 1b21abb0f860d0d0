"""Local files as a commit to a repository on the Hub, which is made where it is missing."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.hub.address import Address
from sae_dist.hub.errors import LOGIN, one_line

CARD = "README.md"


class Pushed(NamedTuple):
    """What is on the Hub now."""

    url: str  # of the repository
    commit: str
    private: bool


def push(address: Address, files: Mapping[str, Path], *, private: bool, front: Path | None = None) -> Pushed:
    """Commits files, by their paths under `address`, whose revision is a branch and is made where it is missing.

    private: a new repository is for its owner only, and one that is public already is refused. front: the README.md of
    a repository that has none yet, where the address is that of a folder. Repeated, a push sends what is not there yet.
    The token is that of `hf auth login` or HF_TOKEN; UserError without one, and for each error of the Hub.
    """
    from huggingface_hub import HfApi, get_token

    with one_line(address), tempfile.TemporaryDirectory(prefix="sae_dist_") as folder:
        if get_token() is None:
            raise UserError(f"{address}: nobody is logged in on the Hub; {LOGIN}")
        api = HfApi()
        api.create_repo(address.repository, private=private, exist_ok=True)
        about = api.model_info(address.repository)
        if private and not about.private:
            raise UserError(f"{address}: the repository is public; say private=false if that is meant, or give another")
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        sent = {f"{address.path}/{name}".lstrip("/"): path for name, path in files.items()}
        if front is not None and not api.file_exists(address.repository, CARD, revision=address.revision):
            sent[CARD] = front
        for name, path in sent.items():
            link = Path(folder, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        commit = api.upload_folder(
            repo_id=address.repository, folder_path=folder, revision=address.revision,
            commit_message=f"Add {', '.join(sorted(files))}",
        )  # fmt: skip
        return Pushed(f"{api.endpoint}/{address.repository}", commit.oid, bool(about.private))

"""A run's dictionary on the Hugging Face Hub: its files in a format, and a card with the run's figures and recipe."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist import formats
from sae_dist.config import UserError
from sae_dist.formats.card import card, front_page
from sae_dist.hub.address import Address
from sae_dist.hub.push import CARD
from sae_dist.public_names import local_paths
from sae_dist.run_files import read_yaml
from sae_dist.sae import dictionary
from sae_dist.sae.find import FILES
from sae_dist.service.summary import SUMMARY_CURE, read_summary
from sae_dist.train.members import MAIN
from sae_dist.train.schedule import base_lr


class Staged(NamedTuple):
    """What a push sends."""

    card: str
    files: dict[str, Path]  # by name; README.md is the card
    front: Path | None  # of a repository that has no README.md yet
    paths: dict[str, str]  # of this machine, that config.json says, by key


@contextmanager
def staged(
    folder: Path, address: Address, *, format: str, license: str | None, card_too: bool, **names: str | None
) -> Iterator[Staged]:
    """The files of the dictionary in `folder`, checked, in a format, with a card. `names` are those of formats.export.

    UserError where it is damaged, or the format has no such dictionaries.
    """
    if formats.known(format) == "saelens" and not address.path:
        raise UserError(f"to={address}: SAELens loads from folders of a repository only; add one, {address}/main")
    with tempfile.TemporaryDirectory(prefix="sae_dist_") as place:
        info = dictionary.check(folder)
        if format == formats.OWN and not any(names.values()):  # as they are, without reading them into memory
            files = {name: folder / name for name in FILES}
        else:
            to = Path(place, "files", address.name)
            written = formats.export(dictionary.load(folder), to, format=format, **names)
            files = {str(path.relative_to(to)): path for path in written}
        figures, recipe = _of_run(folder, info)
        text = card(address, format=format, info=info, figures=figures, recipe=recipe, license=license)
        front = Path(place, "front")
        front.write_text(front_page(address, format=format, info=info, license=license), encoding="utf-8")
        if card_too:
            files[CARD] = Path(place, CARD)
            files[CARD].write_text(text, encoding="utf-8")
        paths = dict(local_paths(info)) if format == formats.OWN else {}  # files of other tools say none
        yield Staged(text, files, front if address.path and card_too else None, paths)


def _of_run(folder: Path, info: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The figures of a dictionary and its recipe, from the files of the run that it lies in, if it lies in one."""
    recipe = {key: info.get(key) for key in ("k", "n_latents", "d_model", "tokens_trained", "seed")}
    name, run = (MAIN, folder.parent) if folder.name == "dictionary" else (folder.name, folder.parent.parent)
    if not (run / "summary.json").is_file():
        return info.get("imported", {}).get("verified", {}), {k: v for k, v in recipe.items() if v is not None}
    summary, train = read_summary(run), read_yaml(run / "config.yaml", cure=SUMMARY_CURE).get("train") or {}
    own = summary if name == MAIN else next((each for each in summary.get("also", []) if each["name"] == name), {})
    lr = own.get("lr") or train.get("lr") or base_lr(info["n_latents"], summary["steps"])
    recipe |= {"lr": f"{lr:.4g}", "steps": summary["steps"], "batch": train.get("batch")}
    return own.get("eval", {}), recipe

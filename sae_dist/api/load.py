"""`sae_dist.load`: a dictionary from wherever it lies."""

from os import PathLike
from typing import Any

from sae_dist import formats
from sae_dist.config import UserError
from sae_dist.config import load as load_config
from sae_dist.formats import Told
from sae_dist.sae import find
from sae_dist.sae.module import DictionaryModule


def load(where: str | PathLike[str], *, format: str | None = None, **told: Any) -> DictionaryModule:
    """The dictionary in `where`: the folder of a finished run, a dictionary's own folder, or either at s3:// or hf://.

    Of a run of several dictionaries that is the main one; the others have folders of their own,
    RUN/dictionaries/NAME. With `format`, it is another tool's file or folder (docs/formats.md), of which `told` says
    what the file does not: hook="resid_post.12", model=... UserError where there is none, or it is damaged.
    """
    place = str(where)
    if format is not None:
        path, _ = formats.on_disk("where", place, format=format)
        return DictionaryModule(formats.read(path.expanduser(), format=format, told=load_config(Told, told)))
    if told:
        raise UserError(f"{next(iter(told))} is for the files of another tool; say which with format=")
    return DictionaryModule(find.load(place))

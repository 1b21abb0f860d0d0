"""Where files that can be made again are kept between runs: models that are converted, measurements of the machine."""

import os
from pathlib import Path

from sae_dist.config import UserError

CURE = "set SAE_DIST_CACHE to a folder that can be written"


def cache_folder() -> Path:
    """SAE_DIST_CACHE, else sae_dist in the user's cache folder (XDG); UserError where the home folder is unknown."""
    own, user = os.environ.get("SAE_DIST_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own).expanduser() if own else Path(user).expanduser() / "sae_dist"
    except RuntimeError as error:  # HOME is not set and this user has no entry in the password file
        raise UserError(f"there is no cache folder ({error}); {CURE}") from None

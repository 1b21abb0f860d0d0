"""What goes wrong with the Hub, as one line with the cure. No line has a token or a signed address in it."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sae_dist.config import UserError
from sae_dist.hub.address import Address

LOGIN = "log in by `hf auth login`, or set HF_TOKEN"
REPEAT = "repeat the command, which goes on with what has not arrived yet"


@contextmanager
def one_line(address: Address) -> Iterator[None]:
    """Turns the errors of huggingface_hub into a UserError about `address`."""
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the client it uses
        OfflineModeIsEnabled,
    )

    try:
        with _quiet():
            yield
    except UserError:
        raise
    except (HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        raise UserError(f"{address}: {_reason(error, address)}") from None
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise UserError(f"{address}: a file did not arrive whole; {REPEAT}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of requests, which has signed addresses in it, and without bars where nobody looks at them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    levels = {name: logging.getLogger(name).level for name in ("huggingface_hub", "httpx", "httpx2")}
    bars = not (are_progress_bars_disabled() or sys.stderr.isatty())
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            enable_progress_bars()


def _reason(error: BaseException, address: Address) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it, or give a folder on a disk"
        case errors.GatedRepoError():
            return f"access has to be asked for on {constants.ENDPOINT}/{address.repository}; then {LOGIN}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {address.revision}; give a branch, a tag or a commit"
        case errors.EntryNotFoundError():
            return f"the repository has no {address.path}; see {constants.ENDPOINT}/{address.repository}"
        case errors.RepositoryNotFoundError():
            return f"there is no such repository, or it is private and not yours to see; check the name, or {LOGIN}"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"{constants.ENDPOINT} does not accept the token ({_said(error)}); {LOGIN} to another"
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            return (
                f"the token does not allow that ({_said(error)}); {LOGIN} to one with the right to write to "
                f"repositories of {address.repository.partition('/')[0]}"
            )
        case errors.HfHubHTTPError():
            return f"{constants.ENDPOINT} answers {error.response.status_code} ({_said(error)}); {REPEAT}"
        case RuntimeError() if isinstance(error.__cause__, Exception):  # an upload by several threads
            return _reason(error.__cause__, address)
        case RuntimeError() | ValueError():
            return f"{_line(str(error))}; {REPEAT}"
    return (
        f"{constants.ENDPOINT} cannot be reached, or the connection broke ({type(error).__name__}); check the network "
        f"and HF_ENDPOINT, and {REPEAT}"
    )


def _said(error: BaseException) -> str:
    """What the server gave as its reason."""
    return _line(str(getattr(error, "server_message", None) or "without a reason"))


def _line(text: str) -> str:
    """Text from elsewhere as part of a line for a terminal, without what signs an address, and without the token."""
    from huggingface_hub import get_token

    text = re.sub(r"\?\S*", "", " ".join(text.split())).replace(get_token() or "\0", "...")
    return "".join(c if c.isprintable() else " " for c in text)[:200]

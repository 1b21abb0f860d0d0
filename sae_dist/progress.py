"""Progress of long work in the log: a line every few seconds says how much is done and how long the rest will take."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY_S = 5.0

logger = logging.getLogger(__name__)


def logged(items: Iterable[T], done: str, total: int, *, of: str = "units") -> Iterator[T]:
    """The items; while they are worked on, lines such as "verified 120 of 4,000 units, 0:34 left"."""
    began = said = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - said >= EVERY_S:
            said = now
            minutes, seconds = divmod(round((now - began) / number * (total - number)), 60)
            logger.info("%s %s of %s %s, %d:%02d left", done, f"{number:,}", f"{total:,}", of, minutes, seconds)
        yield item

"""What the commands that repeat papers do alike: dictionaries of a sweep that are all there, and the last steps."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sae_dist
from sae_dist.config import UserError
from sae_dist.run_files import write_json


def trained(asked: Mapping[str, Any], over: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The points of a sweep of `sae-dist run`; UserError where one is not done."""
    points = sae_dist.sweep("run", dict(asked), over={key: list(values) for key, values in over.items()})
    for point in points:
        if point["state"] != "done":
            raise UserError(f"{asked['out']}: {point['overrides']} is {point['state']}: {point['failure']}")
    return points


@contextmanager
def in_one_line(command: str) -> Iterator[None]:
    """A UserError ends the command, in one line."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{command}: {error}")


def finish(out: Path, found: dict[str, Any], write_page: Callable[[Path, Any], None]) -> None:
    """Writes study.json, and the page from what was written."""
    found["about"] = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    write_json(out / "study.json", found)
    write_page(out / "page", json.loads((out / "study.json").read_text()))
    print(f"the page is {out / 'page/index.html'}")

"""Repeats Scaling Monosemanticity: `python -m benchmarks.paper_2024 [--size laptop] [--out FOLDER] [KEY=VALUE]`.

Keys as of `sae-dist run` choose another model, hook point or text; without any it is SmolLM2 on built-in text. The page
is OUT/page/index.html. Repeated after a stop, it goes on.
"""

import argparse
import json
import logging
import os
import platform
import sys
from pathlib import Path

import torch

from benchmarks.paper_2024 import page, study
from benchmarks.paper_2024.sizes import SIZES
from sae_dist.config import UserError
from sae_dist.run_files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(prog="paper-2024", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-2024"))
    parser.add_argument("keys", nargs="*", metavar="key=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, size = options.out.absolute(), SIZES[options.size]
    out.mkdir(parents=True, exist_ok=True)
    if wrong := [word for word in options.keys if "=" not in word]:
        sys.exit(f"paper-2024: {wrong[0]} is no key=value")
    given = {"model": "smollm2", "hook": "resid_post.9", "text": "builtin"}
    given |= dict(word.split("=", 1) for word in options.keys)
    try:
        points = {recipe: study.dictionaries(out, size, given, recipe) for recipe in study.RECIPES}
        found = study.figures(out, size, points)
    except UserError as error:
        sys.exit(f"paper-2024: {error}")
    found["about"] = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    write_json(out / "study.json", found)
    page.write(out / "page", json.loads((out / "study.json").read_text()))
    print(f"the page is {out / 'page/index.html'}")


if __name__ == "__main__":
    main()

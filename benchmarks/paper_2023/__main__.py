"""Repeats Towards Monosemanticity: `python -m benchmarks.paper_2023 [--size laptop] [--out runs/paper-2023]`.

The page is OUT/page/index.html. Repeated after a stop, it goes on.
"""

import argparse
import json
import logging
import os
import platform
import sys
from pathlib import Path

import torch

from benchmarks.paper_2023 import page, study
from benchmarks.paper_2023.sizes import SIZES
from sae_dist.config import UserError
from sae_dist.run_files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(prog="paper-2023", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-2023"))
    parser.add_argument("--text", type=Path, help="JSON lines of `text` and `category`, instead of Debian packages")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, size = options.out.absolute(), SIZES[options.size]
    out.mkdir(parents=True, exist_ok=True)
    try:
        text = study.prepare(out, size, options.text and options.text.absolute())
        points = {name: study.dictionaries(out, size, text, name) for name in study.SUBJECTS}
        found = study.figures(out, size, points)
    except UserError as error:
        sys.exit(f"paper-2023: {error}")
    found["about"] = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    write_json(out / "study.json", found)
    page.write(out / "page", json.loads((out / "study.json").read_text()))
    print(f"the page is {out / 'page/index.html'}")


if __name__ == "__main__":
    main()

"""Repeats Towards Monosemanticity: `python -m benchmarks.paper_2023 [--size laptop] [--out runs/paper-2023]`.

The page is OUT/page/index.html. Repeated after a stop, it goes on.
"""

import argparse
import logging
from pathlib import Path

from benchmarks.paper import finish, in_one_line
from benchmarks.paper_2023 import page, study
from benchmarks.paper_2023.sizes import SIZES


def main() -> None:
    parser = argparse.ArgumentParser(prog="paper-2023", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-2023"))
    parser.add_argument("--text", type=Path, help="JSON lines of `text` and `category`, instead of Debian packages")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, size = options.out.absolute(), SIZES[options.size]
    out.mkdir(parents=True, exist_ok=True)
    with in_one_line("paper-2023"):
        text = study.prepare(out, size, options.text and options.text.absolute())
        points = {name: study.dictionaries(out, size, text, name) for name in study.SUBJECTS}
        finish(out, study.figures(out, size, points), page.write)


if __name__ == "__main__":
    main()

"""Repeats Scaling Monosemanticity: `python -m benchmarks.paper_2024 [--size laptop] [--out FOLDER] [KEY=VALUE]`.

Keys as of `sae-dist run` choose another model, hook point or text; without any it is SmolLM2 on built-in text. The page
is OUT/page/index.html. Repeated after a stop, it goes on.
"""

import argparse
import logging
from pathlib import Path

from benchmarks.paper import finish, in_one_line
from benchmarks.paper_2024 import page, study
from benchmarks.paper_2024.sizes import SIZES
from sae_dist.config import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog="paper-2024", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-2024"))
    parser.add_argument("keys", nargs="*", metavar="key=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, size = options.out.absolute(), SIZES[options.size]
    out.mkdir(parents=True, exist_ok=True)
    with in_one_line("paper-2024"):
        if wrong := [word for word in options.keys if "=" not in word]:
            raise UserError(f"{wrong[0]} is no key=value")
        given = {"model": "smollm2", "hook": "resid_post.9", "text": "builtin"}
        given |= dict(word.split("=", 1) for word in options.keys)
        points = {recipe: study.dictionaries(out, size, given, recipe) for recipe in study.RECIPES}
        finish(out, study.figures(out, size, points), page.write)


if __name__ == "__main__":
    main()

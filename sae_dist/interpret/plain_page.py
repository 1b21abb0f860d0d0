"""A page without scripts that opens from disk and looks like the feature pages: of a study, or of a comparison."""

import shutil
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from sae_dist.interpret import site
from sae_dist.run_files import write_whole

SHELL = Path(__file__).parent / "plain" / "page.html"


def plain_page(
    sections: Mapping[str, str], *, kind: str, kicker: str, title: str, subtitle: str, figures: str
) -> str:  # fmt: skip
    """The page with those sections, by title, that hold something. `figures` and sections are HTML, the rest is text.

    `kind` is the class of its body and names its styles, KIND.css beside site.css.
    """
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{own}</section>" for name, own in sections.items() if own)
    return Template(SHELL.read_text(encoding="utf-8")).substitute(
        kind=kind, kicker=kicker, title=escape(title), subtitle=escape(subtitle), figures=figures, main=body
    )


def write_plain_page(out: Path, page: str, styles: Path) -> None:
    """Writes index.html last, after its styles: those of all pages, and its own file `styles`."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (site.STATIC / "site.css", styles):
        shutil.copyfile(path, out / path.name)
    write_whole(out / "index.html", page)

"""The documents are current: links lead somewhere, commands compose, keys, files and messages exist."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks import plot_peers
from docs import configuration
from sae_dist.cli.main import main
from sae_dist.config import load

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").glob("*.md"), ROOT / "kernels/README.md"]
)
FOLDERS = ("sae_dist", "kernels", "tests", "benchmarks", "conf", "launch", "docs")
NAME = {page: str(page.relative_to(ROOT)) for page in PAGES}


def anchors(page: Path) -> set[str]:
    """What a link may name in a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `sae-dist` in a code block of the page."""
    text = re.sub(r"\\\n\s+", "", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^ {4,}(.*)$", text, re.MULTILINE):
        words = line if " -m sae_dist " not in line else "sae-dist " + line.partition(" -m sae_dist ")[2]
        if words.startswith("sae-dist ") and "..." not in words:
            yield shlex.split(words, comments=True)[1:]


def spoken() -> str:
    """Every string in the product, a line each, with an ellipsis for what is put into it."""
    found = []
    for source in (ROOT / "sae_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%s|%d", "…", node.value))
    return "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=NAME.get)
def test_every_relative_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.is_relative_to(ROOT) and there.exists(), f"{NAME[page]}: {target}"
        assert not anchor or anchor[1:] in anchors(there), f"{NAME[page]}: {target}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=NAME.get)
def test_every_file_that_is_named_exists(page):
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or "NAME" in path, f"{NAME[page]}: {path}"


def test_every_command_composes(capsys):
    shown = {shlex.join(words): words for page in PAGES for words in commands(page)}
    for line, (command, *arguments) in sorted(shown.items()):  # a command's keys are registered once
        code = main([command, *arguments, "--cfg"])
        said = capsys.readouterr()
        assert code == 0, f"sae-dist {line}: {said.err}"
        config = getattr(importlib.import_module(f"sae_dist.cli.{command}"), "CONFIG", None)
        if config and command != "plan":  # which has keys beside those of its dataclass
            load(config, yaml.safe_load(said.out))
    assert len(shown) > 25


def test_every_key_that_is_named_exists():
    page = configuration.PAGE.read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)) | {"machine.rates.product"}
    sections = {key.partition(".")[0] for key in known if "." in key}
    for document in PAGES:
        text = document.read_text(encoding="utf-8")
        for key in re.findall(rf"`(?:[^`]*\s)?((?:{'|'.join(sections)})\.[a-z][\w.]*)(?:=[^`]*)?`", text):
            exists = key in known or any(each.startswith(f"{key}.") for each in known)
            assert exists or key.endswith((".json", ".jsonl", ".yaml", ".py")), f"{NAME[document]}: {key}"


def test_every_message_of_the_troubleshooting_is_one_that_the_product_has():
    said, page = spoken(), (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [" ".join(each.split()) for each in re.findall(r"^\*\*`([^`]+)`", page, re.MULTILINE)]
    for message in quoted:
        parts = (re.escape(part) for part in message.replace("...", "\0").split("…"))
        pattern = "[^\n]*".join(parts).replace("\0", r"\.\.\.")
        assert re.search(pattern, said), message
    assert len(quoted) > 25


def test_the_configuration_page_is_current():
    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page(), "run python -m docs.configuration"


def test_the_plot_is_current():
    assert plot_peers.IMAGE.read_text(encoding="utf-8") == plot_peers.image(), "run python -m benchmarks.plot_peers"

"""Runs as text: of one run all that its files say, of several a line each."""

import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_dist.cli.report import result_paths
from sae_dist.service.display import duration, quantity
from sae_dist.service.findings import Checkpoint, Finding
from sae_dist.service.run_folder import ENDED
from sae_dist.service.run_progress import FIGURES, Progress, figures, progress
from sae_dist.service.run_status import RunStatus
from sae_dist.train.members import MAIN

LABEL = 11  # characters of the first column, at least
STYLES = {"done": "green", "stopped": "yellow", "silent": "yellow", "unknown": "yellow", "dead": "red", "failed": "red"}
STYLES |= {"refused": "red"}  # all others are at work: cyan
SHOWN = 8  # dictionaries, replicas or ranks; more are counted
JUDGED = {"tokens": "tokens", "fvu": "FVU", "l0": "L0", "dead_fraction": "dead", "loss_recovered": "loss recovered"}


class Line(NamedTuple):
    """A label, and what is to say beside it; without a label it belongs to the line above."""

    label: str
    text: str


def run_view(
    run: RunStatus, found: Sequence[Finding], checkpoint: Checkpoint | None, console: Console
) -> RenderableType:
    """All of one run, wrapped to the console where it is a terminal."""
    width = console.width if console.is_terminal else None
    head = Text.assemble((name_of(run.place), "bold"), ": ", (run.state, style_of(run.state)))
    bar = console.width // 10 if console.is_terminal else 16
    lines = [*_about(run), *_progress(run, min(bar, 32)), *_details(run), *_results(run)]
    if checkpoint is not None:
        lines.append(Line("checkpoint", f"step {checkpoint.step:,}, {duration(run.now - checkpoint.time)} ago"))
    label = max([LABEL, *(len(line.label) for line in lines)])
    body = [each for line in lines for each in _fill(line.text, f"  {line.label:<{label}} ", width)]
    return Group(head, *map(Text, body), *finding_lines(found, width))


def finding_lines(found: Sequence[Finding], width: int | None) -> list[Text]:
    """What is found, wrapped to the width."""
    return [Text(each, style=style) for finding in found for each, style in _said(finding, width)]


def one_line(run: RunStatus) -> str:
    """A run in a line for a log."""
    parts = [f"{part.name} {part.share:.0%}" for part in progress(run)]
    shown = [f"{FIGURES[key]} {quantity(value)}" for key, value in figures(run).get(MAIN, {}).items() if key != "lr"]
    return "  ".join([run.state, *parts, *shown, *_eta(progress(run))])


def runs_table(runs: Sequence[RunStatus]) -> Table:
    """A row a run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("state", "progress", "FVU", "L0", "age"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    table.add_column("run", overflow="fold")
    for run in runs:
        judged = {key: value for key, value in final(run).items() if value is not None} or figures(run).get(MAIN, {})
        table.add_row(
            Text(run.state, style=style_of(run.state)), share_of(run), quantity(judged.get("fvu")),
            quantity(judged.get("l0")), "-" if run.age_s is None else ago(run.age_s), Text(name_of(run.place)),
        )  # fmt: skip
    return table


def style_of(state: str) -> str:
    return STYLES.get(state, "cyan")


def final(run: RunStatus) -> Mapping[str, Any]:
    """The figures on held-out rows of a run that is done."""
    return run.summary["eval"] if run.state == "done" and run.summary is not None else {}


def share_of(run: RunStatus) -> str:
    parts = progress(run)
    return "-" if not parts else f"{min(part.share for part in parts):.0%}"


def ago(seconds: float) -> str:
    """12:34 of less than a day, else days."""
    return duration(seconds) if seconds < 86_400 else f"{seconds / 86_400:.0f} days"


def name_of(place: str) -> str:
    """The last part of a path or URI."""
    return _printable(place.rstrip("/").rpartition("/")[2])


def _about(run: RunStatus) -> Iterator[Line]:
    yield Line("place", run.place)
    if run.said:
        who = f"process {run.said['pid']} on {run.said['host']}" if "host" in run.said else f"process {run.said['pid']}"
        worked, heard = f"for {duration(run.said['wall_seconds'])}", ago(run.age_s or 0)
        if run.works:
            yield Line("at work", f"{worked}, last heard {heard} ago ({who})")
        else:
            yield Line("worked", f"{worked}, {'ended' if run.state in ENDED else 'last heard'} {heard} ago")


def _progress(run: RunStatus, width: int) -> Iterator[Line]:
    shown, text = figures(run), run.said.get("text", {})
    if run.phase != "preparing" and isinstance(text.get("tokens"), int):
        yield Line("text", f"{text['tokens']:,} tokens, {quantity(text.get('documents'))} documents")
    for part in progress(run):
        rate = [f"{part.tokens_per_second:,.0f} tokens/s"] if part.tokens_per_second else []
        counted = f"{part.done:,} of {part.of:,} {part.unit}"
        yield Line(part.name, "  ".join([f"{bar(part.share, width)} {part.share:4.0%}", counted, *rate, *_eta([part])]))
        if part.name == "train" and run.state != "done":
            yield from (_figures(name, values) for name, values in list(shown.items())[:SHOWN])
            if len(shown) > SHOWN:
                yield Line("", f"and {len(shown) - SHOWN} more dictionaries")


def _figures(name: str, values: Mapping[str, float]) -> Line:
    shown = "  ".join(f"{FIGURES[key]} {quantity(value)}" for key, value in values.items())
    return Line("" if name == MAIN else name, shown)


def _details(run: RunStatus) -> Iterator[Line]:
    """A line a replica or rank, while they work."""
    if not run.works:
        return
    harvest = run.said.get("harvest", {})
    replicas = {key: facts for key, facts in harvest.items() if isinstance(facts, Mapping)}
    for name, facts in list(replicas.items())[:SHOWN]:
        parts = [str(facts.get("state", "")), f"on {facts['on']}" if "on" in facts else ""]
        parts += [f"{quantity(facts['tokens_per_second'])} tokens/s"] if "tokens_per_second" in facts else []
        yield Line(name, "  ".join(filter(None, parts)))
    for rank, said in list(run.said.get("ranks", {}).items())[:SHOWN]:
        yield Line(f"rank {rank}", str(said))
    if (more := max(len(replicas), len(run.said.get("ranks", {}))) - SHOWN) > 0:
        yield Line("", f"and {more} more")


def _results(run: RunStatus) -> Iterator[Line]:
    """Of a training that is done: the figures, and where its parts are."""
    if run.state != "done" or run.summary is None:
        return
    summary = run.summary
    counted = f"{summary['steps']:,} steps, {summary['tokens_trained']:,} tokens, {summary['n_latents']:,} latents"
    yield Line("trained", f"{counted}, {summary['tokens_per_second']:,.0f} tokens/s")
    judged = [("held out", summary["eval"]), *((one["name"], one["eval"]) for one in summary.get("also", []))]
    for name, own in judged:
        known = [f"{label} {quantity(own[key])}" for key, label in JUDGED.items() if own.get(key) is not None]
        yield Line(name, "  ".join(known))
    for each in result_paths(summary):
        label, _, where = each.partition(": ")
        own = run.config.get("out")
        yield Line(label, where.replace(own, run.place, 1) if own and where.startswith(own) else where)


def _eta(parts: Sequence[Progress]) -> list[str]:
    left = [part.eta_s for part in parts if part.eta_s is not None]
    return [f"ETA {duration(max(left))}"] if left else []


def bar(share: float, width: int) -> str:
    full, empty = ("█", "░") if _can_say("█░") else ("#", "-")
    filled = round(share * width)
    return full * filled + empty * (width - filled)


def _can_say(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _said(finding: Finding, width: int | None) -> Iterator[tuple[str, str]]:
    """A finding's lines with their styles; a command is not wrapped, for it is to be copied."""
    yield from ((line, "yellow") for line in _fill(finding.what, "  ! ", width))
    if finding.do:
        yield from ((line, "") for line in _fill(finding.do, "    -> ", width))
    if finding.command:
        yield from ((line, "bold") for line in _fill(finding.command, "       ", None))


def _fill(text: str, lead: str, width: int | None) -> list[str]:
    """`text` behind `lead`, wrapped under itself; a path is never broken."""
    text, lead = _printable(text), _printable(lead)
    if width is None:
        return [(lead + text).rstrip()]
    indent = " " * len(lead)
    return textwrap.wrap(
        text, max(width, 40), initial_indent=lead, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _printable(text: str) -> str:
    """What a file said, without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def clock() -> str:
    return time.strftime("%H:%M:%S")

"""A sweep as text: a row a point with its swept keys and figures, what is under way, what is left."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_dist.cli.status_view import bar, finding_lines, name_of, one_line
from sae_dist.service.display import duration, quantity
from sae_dist.service.findings import Finding
from sae_dist.service.sweep_status import SweepStatus
from sae_dist.sweep.point import Point

COLUMNS = {"fvu": "FVU", "l0": "L0", "dead_fraction": "dead", "loss_recovered": "loss recovered"}
WORDS = {"leased": "at work"}  # states of the ledger, as a person says them
STYLES = {"done": "green", "failed": "red", "leased": "cyan"}


def sweep_view(sweep: SweepStatus, found: Sequence[Finding], console: Console) -> RenderableType:
    """All of a sweep."""
    done, width = sweep.counts.get("done", 0), console.width // 6 if console.is_terminal else 16
    share = done / len(sweep.points) if sweep.points else 0.0
    head = Text.assemble((name_of(sweep.place), "bold"), f": {sweep_line(sweep)}")
    passes = [Text(f"  {run.place.rpartition('/')[2]}  {one_line(run)}") for run in sweep.passes]
    said = finding_lines(found, console.width if console.is_terminal else None)
    return Group(head, Text(f"  {bar(share, min(width, 32))} {share:.0%}"), points_table(sweep.points), *passes, *said)


def sweep_line(sweep: SweepStatus) -> str:
    """A sweep in a line: how many points are in which state, what they took, what is left."""
    counts = sweep.counts
    parts = [
        f"{counts[state]} {WORDS.get(state, state)}"
        for state in ("done", "leased", "pending", "failed")
        if counts.get(state)
    ]
    parts.append(f"{duration(sweep.seconds)} of training")
    parts += [f"cost {quantity(sweep.cost)}"] if sweep.cost is not None else []
    return ", ".join(parts) + (f"  ETA {duration(sweep.eta_s)}" if sweep.eta_s is not None else "")


def points_table(points: Sequence[Point]) -> Table:
    """A row a point: its values of the swept keys, its state, what was measured, the time that it took."""
    keys = list(dict.fromkeys(key for point in points for key in point.overrides))
    figures = {point.id: (point.summary or {}).get("eval", {}) for point in points}
    measured = [name for name in COLUMNS if any(own.get(name) is not None for own in figures.values())]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in (*keys, "state", *(COLUMNS[name] for name in measured), "time", "point"):
        table.add_column(heading, justify="left" if heading in ("state", "point") else "right", no_wrap=True)
    for point in points:
        swept = (Text(quantity(point.overrides.get(key))) for key in keys)
        table.add_row(
            *swept, Text(WORDS.get(point.state, point.state), style=STYLES.get(point.state, "")),
            *(quantity(figures[point.id].get(name)) for name in measured),
            "-" if point.seconds is None else duration(point.seconds), Text(point.id),
        )  # fmt: skip
    return table

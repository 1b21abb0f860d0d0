"""A finished run's figures as a table on standard output."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sae_dist.service.display import duration, quantity
from sae_dist.train.members import MAIN

_ROWS = (  # (key in summary.json, what a person reads)
    ("n_latents", "latents"),
    ("d_model", "d_model"),
    ("k", "k"),
    ("tokens_trained", "tokens trained on"),
    ("eval.tokens", "held-out tokens"),
    ("eval.fvu", "FVU"),
    ("eval.l0", "L0"),
    ("eval.cosine", "cosine"),
    ("eval.dead_fraction", "dead fraction"),
    ("eval.ce_clean", "cross-entropy, model as it is"),
    ("eval.ce_spliced", "  reconstruction spliced in"),
    ("eval.ce_mean_ablated", "  mean ablation"),
    ("eval.ce_zero_ablated", "  zero ablation"),
    ("eval.loss_recovered", "loss recovered (zero ablation = 0)"),
    ("eval.loss_recovered_mean", "loss recovered (mean ablation = 0)"),
)
_COLUMNS = {"fvu": "FVU", "l0": "L0", "dead_fraction": "dead", "loss_recovered": "loss recovered"}


def print_summary(summary: Mapping[str, Any]) -> None:
    table = Table(title=summary["name"], title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, label in _ROWS:
        value: Any = summary
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            table.add_row(label, quantity(value))
    table.add_row("wall time", duration(summary["wall_seconds"]))
    console = Console()
    console.print(table)
    for figure, why in summary["eval"].get("not_measured", {}).items():
        if figure in ("tokens", "fvu"):  # the others follow, or need a model that `train` does not have
            console.print(f"{figure} is not measured: {why}", soft_wrap=True, highlight=False)
    if summary.get("also"):
        console.print(_members(summary))
    for line in [f"ALERT: {alert}" for alert in summary.get("alerts", [])] + result_paths(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def result_paths(summary: Mapping[str, Any]) -> list[str]:
    """Where the parts of a finished run are, a line each."""
    own = [f"{key}: {summary[key]}" for key in ("dictionary", "pages") if summary.get(key)]
    return own + [f"{member['name']}: {member['dictionary']}" for member in summary.get("also", [])]


def _members(summary: Mapping[str, Any]) -> Table:
    """All dictionaries of a pass, a row each."""
    rows = [{**summary, "name": MAIN}, *summary["also"]]
    columns = {key: label for key, label in _COLUMNS.items() if any(row["eval"][key] is not None for row in rows)}
    table = Table(title="dictionaries of the pass", title_justify="left")
    for heading in ("", "latents", "k", *columns.values(), "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        figures = [quantity(value) for value in (row["n_latents"], row["k"], *(row["eval"][key] for key in columns))]
        table.add_row(row["name"], *figures, quantity(summary["tokens_per_second"]))
    return table

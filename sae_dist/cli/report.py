"""A finished run's figures as a table on standard output."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sae_dist.service.display import duration, quantity

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
    for key in ("dictionary", "pages"):
        if summary.get(key):
            console.print(f"{key}: {summary[key]}", soft_wrap=True, highlight=False)

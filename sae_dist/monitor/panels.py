"""The figures that people look for, by name: what belongs to one dictionary, and the bins of its histogram."""

from collections.abc import Iterable, Mapping
from typing import Any

# Figures that every dictionary of a pass has of its own, under its name: 'k64/fvu'. All others are the whole run's.
OWN = frozenset({
    "lr", "fvu", "l0", "dead_fraction", "dense_fraction", "silent_fraction", "density_histogram", "gradient_norm",
    "encoder_norm", "decoder_norm", "b_enc_norm", "b_dec_norm", "skipped_steps", "loss_spikes", "roll_backs",
    "threshold", "penalty", "widened_rows", "alert",
})  # fmt: skip
DENSE = 0.1  # share of the rows: a latent that is active on more of them is dense
HISTOGRAM = "density_histogram"
LEAST, BINS_A_DECADE = -6, 4
# log10 of the share of rows that a latent is active on; below the first edge counts in the first bin
EDGES = tuple(LEAST + step / BINS_A_DECADE for step in range(-LEAST * BINS_A_DECADE + 1))


def of_dictionary(figures: Mapping[str, Any], prefix: str, others: Iterable[str]) -> dict[str, Any]:
    """Of a line's figures those of one dictionary, without its prefix, and those of the whole run.

    `prefix` is empty for the main dictionary; `others` are the prefixes of all the others of the pass.
    """
    foreign = tuple(other for other in others if other)
    shared = {
        name: value
        for name, value in figures.items()
        if name not in OWN and not name.startswith(foreign) and not (prefix and name.startswith(prefix))
    }
    own = {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
    return shared | {name: value for name, value in own.items() if name in OWN}

"""SAEDashboard (0.8): batch-N.json of 128 latents each, and skipped_indexes.json, which Neuronpedia's importer takes.

A context that is one of the strongest has bin_min and bin_contains -1, as its own writer has it. What SAEDashboard
measures on the model (correlated neurons, a histogram of logits) is left empty.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_dist.dashboards.latents import Latent, Latents, bins, columns
from sae_dist.dashboards.source import Source
from sae_dist.formats.files import as_json, write_new

BATCH = 128  # latents a file
NOT_MEASURED = (
    *(f"correlated_{of}_{what}" for of in ("neurons", "features") for what in ("indices", "l1", "pearson")),
    "logits_hist_data_bar_values", "logits_hist_data_bar_heights", "decoder_weights_dist",
)  # fmt: skip


def write(latents: Latents, to: Path, source: Source) -> Iterator[Path]:
    """Files that are complete are kept, so that the command goes on after a stop."""
    skipped = list[int]()
    for number, (fired, silent) in enumerate(latents.batches(BATCH)):
        skipped += silent
        batch = {
            "model_id": source.model, "layer": source.layer, "sae_set": source.set_name, "sae_id_suffix": None,
            "features": [_feature(latent, source) for latent in fired],
        }  # fmt: skip
        yield write_new(to / f"batch-{number}.json", as_json(batch))
    about = {"model_id": source.model, "layer": str(source.layer), "sae_set": source.set_name,
             "skipped_indexes": skipped}  # fmt: skip
    yield write_new(to / "skipped_indexes.json", as_json(about))


def _feature(latent: Latent, source: Source) -> dict[str, Any]:
    return {
        "feature_index": latent.number, **columns(latent), **dict.fromkeys(NOT_MEASURED, []),
        "n_prompts_total": source.prompts, "n_tokens_in_prompt": source.context, "dataset": source.text,
        "vector": latent.vector,
        "activations": [
            dict(zip(("bin_min", "bin_max", "bin_contains"), bins(latent, context), strict=True))
            | {"tokens": context.tokens, "values": context.values, "qualifying_token_index": context.at}
            for context in latent.contexts
        ],
    }  # fmt: skip

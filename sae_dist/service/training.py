"""The train command: a store to a dictionary and its figures, in one process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.evaluate import UNMEASURED_LOSS, evaluate_reconstruction
from sae_dist.monitor import write_json
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.service.config import TrainJob, config_hash
from sae_dist.service.display import Display, progress
from sae_dist.service.run_folder import RunFolder
from sae_dist.service.summary import summarize
from sae_dist.service.trainer import chosen_hook, run_training
from sae_dist.shards import reader


def train_and_judge(job: TrainJob, *, stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains, judges the dictionary on the store's held-out units, and returns the summary (summary.json)."""
    out = Path(job.out)
    store = reader.open(storage.open(job.store))
    hook = chosen_hook(store, job.hook)
    folder = RunFolder(out, job)
    try:
        with Display(str(out)) as display:

            def watch(step: int, _: Mapping[str, float]) -> None:
                facts = progress(out, job.train)
                display.update("train", facts, now=step == job.train.n_steps)
                folder.status("running", train=facts)

            hashed = config_hash(job)
            trained = run_training(job, live=False, provenance={"config_hash": hashed}, stop=stop, watch=watch)
        figures = dict(UNMEASURED_LOSS)
        if store.meta.heldout_units:
            found = dictionary_file.load(out / "dictionary")
            figures |= evaluate_reconstruction(found, store, hook, EvaluateConfig())
        summary = summarize(job, hook=hook, store=store, trained=trained, hashed=hashed, figures=figures)
        summary["wall_seconds"] = folder.wall_seconds
        write_json(out / "summary.json", summary)
        folder.status("done", step=trained.steps, tokens=trained.tokens)
        return summary
    except Stopped as stopped:
        folder.status("stopped", note=str(stopped))
        raise
    except UserError as error:
        folder.status("refused", note=str(error))
        raise
    finally:
        folder.close()

"""The train command: a store to a dictionary and its figures, in one process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_dist import storage
from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.evaluate import UNMEASURED, evaluate_reconstruction
from sae_dist.monitor import write_json
from sae_dist.service.config import TrainJob, config_hash
from sae_dist.service.display import Display, progress
from sae_dist.service.run_folder import RunFolder
from sae_dist.service.summary import read_finished, summarize
from sae_dist.service.trainer import check_heldout, check_mesh, chosen_hook, run_training
from sae_dist.shards import reader


def train_and_judge(job: TrainJob, *, stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains, judges the dictionary on the store's held-out units, and returns the summary (summary.json)."""
    check_mesh(job.mesh)
    job = job.located()
    out = Path(job.out)
    store = reader.open(storage.open(job.store))
    hook = chosen_hook(store, job.hook)
    hashed = config_hash(job, store.meta.digest)
    folder = RunFolder(out, job)
    with folder.outcome():
        if (finished := read_finished(out, hashed)) is not None:
            return finished
        check_heldout(store)
        with Display(str(out)) as display:

            def watch(step: int, _: Mapping[str, Any]) -> None:
                facts = progress(out, job.train)
                display.update("train", facts, now=step == job.train.n_steps)
                folder.status("running", train=facts)

            trained = run_training(job, live=False, provenance={"config_hash": hashed}, stop=stop, watch=watch)
        figures = dict(UNMEASURED)
        if store.meta.heldout_units:
            figures |= evaluate_reconstruction(trained.dictionary, store, hook, EvaluateConfig())
        summary = summarize(job, hook=hook, store=store, trained=trained, hashed=hashed, figures=figures)
        summary["wall_seconds"] = folder.wall_seconds
        write_json(out / "summary.json", summary)
        folder.status("done", step=trained.steps, tokens=trained.tokens)
        return summary

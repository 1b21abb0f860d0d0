"""Labels of a run's latents, made from its feature data, by one process at a time."""

from pathlib import Path

from sae_dist.config import UserError
from sae_dist.interpret.read_features import features
from sae_dist.label.config import LabelConfig
from sae_dist.label.work import write_labels
from sae_dist.service.run_folder import claim


def label_run(run: Path, config: LabelConfig) -> Path:
    """Writes `<run>/labels` and returns it; UserError where the run has no feature data."""
    if not (run / "features").is_dir():
        raise UserError(
            f"run={run} has no feature data, from which labels are made; write it with `sae-dist pages {run} data=true`"
        )
    with claim(run):
        return write_labels(run, features(run), config)

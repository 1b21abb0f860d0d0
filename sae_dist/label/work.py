"""Labels all that is wanted, some latents at a time: complete or absent, and repeated after a stop it goes on."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae_dist import checksums
from sae_dist.config import digest, to_dict
from sae_dist.interpret.parquet import write_parquet
from sae_dist.interpret.read_features import Features
from sae_dist.interpret.read_labels import FOLDER, KINDS, SCHEMA, SCORES, TABLE
from sae_dist.label import score
from sae_dist.label.choose import LabellerAndJudge, chosen
from sae_dist.label.config import LabelConfig
from sae_dist.label.evidence import Evidence, Source, chance_of
from sae_dist.label.interface import Question
from sae_dist.label.page import write_page
from sae_dist.progress import logged
from sae_dist.run_files import read_json, write_json, write_whole

logger = logging.getLogger(__name__)

FORMAT = 1
TOGETHER = 64  # latents; one's label is another's control, and a part of the work is complete with them
BEGUN = "begun"
HOW_FAST = ("requests", "timeout", "retries", "backoff")  # keys that change no label

Row = dict[str, Any]


def write_labels(out: Path, features: Features, config: LabelConfig) -> Path:
    """Writes `<out>/labels` from feature data and returns it.

    Answers of a language model stay in `<out>/labels.answers.jsonl`, whatever is asked for next.
    """
    source = Source(features, shown=config.contexts, held=config.held_out, seed=config.seed)
    latents = source.wanted(config.latents)
    n_scored = len(latents) if config.scored is None else min(config.scored, len(latents))
    scored = set(chance_of(config.seed, "scored").sample(latents, n_scored))
    with chosen(config, out / "labels.answers.jsonl") as judge:
        keys = {key: value for key, value in to_dict(config).items() if key not in HOW_FAST}
        evidence = read_json(features.folder / checksums.NAME, dict[str, str], cure="write the feature data again")
        made_from = digest([FORMAT, keys, judge.identity, evidence])
        folder, partial = out / FOLDER, out / f"{FOLDER}.partial"
        if _is_done(folder, made_from):
            logger.info("%s has these labels already", folder)
            return folder
        _begin(partial, made_from)
        parts = {partial / f"part-{block[0]:09d}.parquet": block for block in _blocks(latents)}
        left = {path: block for path, block in parts.items() if not path.exists()}

        work = _work(left, source, judge, scored, config)
        for _ in logged(work, "labelled", sum(map(len, left.values())), of="latents"):
            pass
    facts = {"format": FORMAT, "made_from": made_from, "by": config.model or config.by, "config": keys}
    return _finish(partial, folder, list(parts), facts)


def _blocks(latents: Sequence[int]) -> Iterator[Sequence[int]]:
    """Of equal size within one, so that a latent is alone only where it is the only one."""
    n = -(-len(latents) // TOGETHER)
    for number in range(n):
        yield latents[number * len(latents) // n : (number + 1) * len(latents) // n]


def _work(
    left: Mapping[Path, Sequence[int]], source: Source, judge: LabellerAndJudge, scored: set[int], config: LabelConfig
) -> Iterator[Row]:
    """Writes the parts that are left; gives every row when it is known."""
    for path, block in left.items():
        rows = []
        for row in _rows(list(source.read(block)), judge, scored, seed=config.seed):
            rows.append(row | {"by": config.model or config.by})
            yield row
        _write(path, pa.Table.from_pylist(rows, schema=SCHEMA))


def _rows(evidence: Sequence[Evidence], judge: LabellerAndJudge, scored: set[int], *, seed: int) -> Iterator[Row]:
    """A row for each latent: its label, and the scores of it and of the label of another of these latents."""
    labels = list(judge.label(evidence))
    labelled = [place for place, label in enumerate(labels) if label]
    order = chance_of(seed, f"shuffled {[each.latent for each in evidence]}").sample(labelled, len(labelled))
    other = dict(zip(order, order[1:] + order[:1], strict=True)) if len(order) > 1 else {}
    trials = [
        {kind: score.trial(kind, each, seed=seed) for kind in KINDS} if label and each.latent in scored else {}
        for each, label in zip(evidence, labels, strict=True)
    ]
    answers = judge.judge([
        Question(kind, labels[by], own.items)
        for place, own_trials in enumerate(trials) for kind, own in own_trials.items() if not own.why
        for by in (place, other.get(place)) if by is not None
    ])  # fmt: skip
    for place, each in enumerate(evidence):
        row: Row = {"latent": each.latent, "label": labels[place] or None}
        for kind in KINDS if each.latent in scored else ():
            own = trials[place].get(kind, score.Trial((), (), score.NO_LABEL))
            row[f"{kind}_why"] = own.why or None
            if not own.why:
                row |= _scores(kind, own, next(answers), next(answers) if place in other else None)
        yield row


def _scores(kind: str, trial: score.Trial, own: list[bool] | None, others: list[bool] | None) -> Row:
    if own is None:
        return {f"{kind}_why": score.UNREAD}
    value, low, high = score.score(trial, own)
    shuffled = None if others is None else score.score(trial, others).value
    return {
        kind: value, f"{kind}_low": low, f"{kind}_high": high, f"{kind}_shuffled": shuffled,
        f"{kind}_items": len(trial.items),
    }  # fmt: skip


def _is_done(folder: Path, made_from: str) -> bool:
    return (folder / SCORES).is_file() and read_json(
        folder / SCORES, dict[str, Any], cure=f"remove {folder}, and repeat the command"
    ).get("made_from") == made_from


def _begin(partial: Path, made_from: str) -> None:
    """A folder for this work: that of an earlier try at the same, or an empty one."""
    begun = partial / BEGUN
    if begun.is_file() and begun.read_text() == made_from:
        logger.info("going on with the labels in %s", partial)
        return
    shutil.rmtree(partial, ignore_errors=True)
    write_whole(begun, made_from)


def _write(path: Path, rows: pa.Table) -> None:
    write_parquet(path, rows, use_dictionary=False, write_page_checksum=True)


def _finish(partial: Path, folder: Path, parts: Sequence[Path], facts: Row) -> Path:
    """Puts the parts together, with scores and the page, and removes them."""
    table = pa.concat_tables(pq.read_table(path) for path in parts)
    _write(partial / TABLE, table)
    labelled = len(table) - table["label"].null_count
    scores = facts | {"latents": len(table), "labelled": labelled} | {kind: _summary(table, kind) for kind in KINDS}
    write_json(partial / SCORES, scores)
    write_page(partial, table, scores, run=folder.parent)
    for path in (*parts, partial / BEGUN):
        path.unlink()
    checksums.write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _summary(table: pa.Table, kind: str) -> Row:
    own, shuffled, why = (table[f"{kind}{name}"].to_pylist() for name in ("", "_shuffled", "_why"))
    pairs = [(a, b) for a, b in zip(own, shuffled, strict=True) if a is not None and b is not None]
    found = score.summary([value for value in own if value is not None], pairs)
    not_scored = Counter(reason for reason in why if reason is not None)
    return found | {"not_scored": dict(sorted(not_scored.items())), "said": score.verdict(kind, found)}

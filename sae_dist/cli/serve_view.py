"""Runs, their members and sweeps as a page: a row each with state, progress and figures. All it shows is escaped."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote

from sae_dist import storage
from sae_dist.cli.status_view import JUDGED, ago, one_line, style_of
from sae_dist.cli.sweep_view import sweep_line
from sae_dist.config import UserError
from sae_dist.service.display import duration, quantity
from sae_dist.service.findings import findings
from sae_dist.service.run_progress import figures, progress
from sae_dist.service.run_status import RunStatus, read_run
from sae_dist.service.shown_features import KEPT, ShownFeatures
from sae_dist.service.shown_folder import ShownFolder
from sae_dist.service.sweep_status import SweepStatus, read_sweep
from sae_dist.storage import StorageError
from sae_dist.train.members import MAIN

logger = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
LEAST_S = 2.0  # between two looks at the files, however many people ask
SPARING = 5.0  # looking takes at most a part of the time: one second in so many
COLUMNS = {key: JUDGED[key] for key in ("fvu", "l0", "dead_fraction", "loss_recovered")}
COLOURS = {"green": "done", "yellow": "ended", "red": "failed", "cyan": "works"}
MORE = {"features": "feature data", "labels": "labels"}  # folders of a run that are shown beside its pages
FOUND = 2  # of what is to be known of a run


class Shown(NamedTuple):
    """A run or a sweep by its path in the folder, whether its pages or its report are there, and what else is."""

    name: str
    what: RunStatus | SweepStatus | str  # or why it cannot be read
    page: bool
    more: Sequence[str] = ()  # of a run: keys of MORE
    pages: Sequence[str] = ()  # of a sweep: points with feature pages


class Snapshots:
    """The page, made again when somebody asks and the last one is some seconds old. For several threads."""

    def __init__(self, folder: ShownFolder, features: ShownFeatures, *, retry_s: float) -> None:
        self._folder, self._features, self._retry_s, self._lock = folder, features, retry_s, threading.Lock()
        self._page, self._until = "", 0.0

    def __call__(self) -> str:
        """StorageError when the storage does not answer."""
        with self._lock:
            began = time.monotonic()
            if began >= self._until:
                self._page = page(self._folder.uri, *self._look())
                took = time.monotonic() - began
                self._until = time.monotonic() + max(LEAST_S, SPARING * took)
            return self._page

    def read_ahead(self) -> None:
        """Reads the feature data of the newest runs as far as their lists need it, before somebody waits for one."""
        try:
            runs, _ = self._look()
            for run in [run for run in runs if "features" in run.more][:KEPT]:
                self._features.read_ahead(_parts(run.name))
        except UserError as problem:
            logger.warning("feature data will be read when somebody asks for them: %s", problem)

    def _look(self) -> tuple[list[Shown], list[Shown]]:
        """All runs, the newest first, and all sweeps by name."""
        found = self._folder.found()
        runs = [
            self._shown(name, read_run(self._place(name)), "pages")._replace(more=self._more(name))
            for name in found.runs
        ]
        return sorted(runs, key=_age), list(map(self._sweep, found.sweeps))

    def _sweep(self, name: str) -> Shown:
        try:
            sweep = read_sweep(self._place(name), retry_s=self._retry_s)
        except StorageError:
            raise
        except UserError as damage:
            return Shown(name, str(damage), False)
        points = [] if sweep is None else [f"{name}/points/{one.id}".lstrip("/") for one in sweep.points]
        shown = self._shown(name, sweep, "report")
        return shown._replace(pages=[point for point in points if self._has(point, "pages")])

    def _shown(self, name: str, what: RunStatus | SweepStatus | None, page: str) -> Shown:
        return Shown(name, "it is gone" if what is None else what, self._has(name, page))

    def _more(self, run: str) -> list[str]:
        has = {"features": self._features.has(_parts(run)), "labels": self._has(run, "labels")}
        return [kind for kind in MORE if has[kind]]

    def _has(self, name: str, page: str) -> bool:
        with self._folder.open([*_parts(name), page, "index.html"]) as file:
            return file is not None

    def _place(self, name: str) -> storage.Storage:
        return storage.open(f"{self._folder.uri}/{name}".rstrip("/"), retry_s=self._retry_s)


def _parts(name: str) -> list[str]:
    return [*filter(None, name.split("/"))]


def _age(shown: Shown) -> float:
    """Of what the run said last; what never said anything comes last."""
    age = shown.what.age_s if isinstance(shown.what, RunStatus) else None
    return float("inf") if age is None else age


def page(place: str, runs: Sequence[Shown], sweeps: Sequence[Shown]) -> str:
    """The whole page."""
    shell = Template((STATIC / "serve.html").read_text(encoding="utf-8"))
    at_work = sum(isinstance(run.what, RunStatus) and run.what.works for run in runs)
    counts = [f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"] if runs else []
    counts += [f"{at_work} at work"] if at_work else []
    counts += [f"{len(sweeps)} {'sweep' if len(sweeps) == 1 else 'sweeps'}"] if sweeps else []
    parts = [_runs(place, runs)] if runs else []
    parts += [_sweeps(place, sweeps)] if sweeps else []
    nothing = '<p class="message">There is no run and no sweep here yet. This page shows them once there are.</p>'
    return shell.substitute(
        title=escape(_last(place)),
        subtitle=escape(" · ".join([place, *counts])),
        main="\n".join(parts) or nothing,
    )


def _runs(place: str, runs: Sequence[Shown]) -> str:
    heads = "".join(f'<th scope="col" class="n">{label}</th>' for label in COLUMNS.values())
    body = "".join(f"<tbody>{''.join(_run(place, run))}</tbody>" for run in runs)
    return (
        '<section aria-label="Runs"><h2>Runs</h2><table><thead><tr><th scope="col">run</th><th scope="col">state</th>'
        f'<th scope="col">progress</th>{heads}<th scope="col" class="n">last heard</th></tr></thead>{body}</table>'
        "</section>"
    )


def _run(place: str, shown: Shown) -> Iterator[str]:
    """A row of the run, one of each more dictionary, and what is to be known of it."""
    run = shown.what
    if not isinstance(run, RunStatus):
        yield _broken(place, shown)
        return
    known = dictionaries(run)
    heard = "" if run.age_s is None else ago(run.age_s)
    trend = _trend(run) if run.works else ""
    yield (
        f"<tr>{_name(place, shown, 'pages', about(run.config))}<td>{_state(run.state)}</td><td>{_progress(run)}</td>"
        f'{_figures(known.get(MAIN, {}), trend)}<td class="n quiet" data-label="last heard">{heard}</td></tr>'
    )
    for name, own in known.items():
        if name != MAIN:
            yield (
                f'<tr class="member"><th scope="row">{escape(name)}</th><td></td><td></td>{_figures(own)}<td></td></tr>'
            )
    for finding in findings(run)[:FOUND]:
        yield f'<tr class="finding"><td colspan="8">{escape(finding.what)}</td></tr>'


def _sweeps(place: str, sweeps: Sequence[Shown]) -> str:
    body = "".join(f"<tbody>{''.join(_sweep(place, sweep))}</tbody>" for sweep in sweeps)
    return (
        '<section aria-label="Sweeps"><h2>Sweeps</h2><table><thead><tr><th scope="col">sweep</th>'
        '<th scope="col">state</th><th scope="col">points</th><th scope="col" class="n">least FVU</th>'
        f'<th scope="col" class="n">training time</th></tr></thead>{body}</table></section>'
    )


def _sweep(place: str, shown: Shown) -> Iterator[str]:
    """A row of the sweep, one of each pass that is at work, and links to pages of its points."""
    sweep = shown.what
    if not isinstance(sweep, SweepStatus):
        yield _broken(place, shown)
        return
    done, points = sweep.counts.get("done", 0), len(sweep.points)
    judged = [(point.summary or {}).get("eval", {}).get("fvu") for point in sweep.points]
    least = min((fvu for fvu in judged if fvu is not None), default=None)
    keys = ", ".join(dict.fromkeys(key for point in sweep.points for key in point.overrides))
    state = "working" if not sweep.over else "done" if done == points else "ended"
    yield (
        f"<tr>{_name(place, shown, 'report', keys)}<td>{_state(state)}</td>"
        f"<td>{_bar(done / points if points else 0.0)}<span>{escape(sweep_line(sweep))}</span></td>"
        f'<td class="n" data-label="least FVU">{quantity(least)}</td>'
        f'<td class="n quiet" data-label="training time">{duration(sweep.seconds)}</td></tr>'
    )
    for run in sweep.passes:
        said = f"{_last(run.place)}  {one_line(run)}"
        yield f'<tr class="member"><td colspan="5">{escape(said)}</td></tr>'
    if shown.pages:
        links = ", ".join(f'<a href="{_href(point)}/pages/">{escape(_last(point))}</a>' for point in shown.pages)
        yield f'<tr class="member"><td colspan="5">feature pages of points: {links}</td></tr>'


def dictionaries(run: RunStatus) -> Mapping[str, Mapping[str, Any]]:
    """The figures of every dictionary by name: those on held-out rows once the run is done, else of its last step."""
    if run.state == "done" and run.summary is not None:
        return {MAIN: run.summary["eval"]} | {one["name"]: one["eval"] for one in run.summary.get("also", [])}
    return figures(run)


def about(config: Mapping[str, Any]) -> str:
    """Model, hook point and dictionary of a configuration, as far as it says them."""
    sae, model = _mapping(config, "sae"), _mapping(config, "model")
    hook = config.get("hook")
    latents = f"{quantity(sae['n_latents'])} latents" if "n_latents" in sae else ""
    parts = (
        model.get("name"), " + ".join(map(str, hook)) if isinstance(hook, list) else hook, sae.get("kind"), latents,
        f"k {sae['k']}" if sae.get("k") is not None else "",
    )  # fmt: skip
    return " · ".join(str(part) for part in parts if part)


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _name(place: str, shown: Shown, page: str, said: str) -> str:
    """The cell with the name, which leads to the pages or the report."""
    name, below = escape(shown.name or _last(place)), f"{_href(shown.name)}{'/' if shown.name else ''}"
    link = f'<a href="{below}{page}/">{name}</a>' if shown.page else name
    notes = [escape(said)] if said else []
    notes += [] if shown.page else [f"no {page}"]
    notes += [f'<a href="{below}{kind}/">{MORE[kind]}</a>' for kind in shown.more]
    return f'<th scope="row"><b>{link}</b><span class="note">{" · ".join(notes)}</span></th>'


def _broken(place: str, shown: Shown) -> str:
    return f'<tr>{_name(place, shown, "page", "")}<td colspan="7" class="broken">{escape(str(shown.what))}</td></tr>'


def _figures(own: Mapping[str, Any], trend: str = "") -> str:
    """A cell a figure; the trend stands before the FVU."""
    cells = []
    for key, label in COLUMNS.items():
        kind, before = "n" if own.get(key) is not None else "n none", trend if key == "fvu" else ""
        cells.append(f'<td class="{kind}" data-label="{label}">{before}{escape(quantity(own.get(key)))}</td>')
    return "".join(cells)


def _state(state: str) -> str:
    colour = COLOURS["yellow" if state == "ended" else style_of(state)]
    return f'<span class="state {colour}">{escape(state)}</span>'


def _progress(run: RunStatus) -> str:
    """A bar of the phase that is furthest from its end, each phase in words, and the time that is left."""
    parts = progress(run)
    if not parts:
        return ""
    left = [part.eta_s for part in parts if part.eta_s is not None]
    words = [f"{part.name} {part.share:.0%}" for part in parts] if run.works else []
    counted = [f"{part.done:,} of {part.of:,} {part.unit}" for part in parts if part.name == "train"]
    words = [*words, *(counted if not run.works else []), *([f"{duration(max(left))} left"] if left else [])]
    return f"{_bar(min(part.share for part in parts))}<span>{escape(' · '.join(words))}</span>"


def _bar(share: float) -> str:
    """As a picture: the page's own styles cannot know the share."""
    return f'<progress max="1" value="{share:.4f}">{share:.0%}</progress>'


def _trend(run: RunStatus) -> str:
    """The FVU of the newest lines of training as a small line."""
    values = [line["fvu"] for line in run.training if isinstance(line.get("fvu"), int | float)]
    values = values[:: max(len(values) // 60, 1)]
    if len(values) < 3 or max(values) == min(values):
        return ""
    low, high = min(values), max(values)
    points = (
        f"{60 * at / (len(values) - 1):.1f},{16 - 14 * (v - low) / (high - low):.1f}" for at, v in enumerate(values)
    )
    return f'<svg class="trend" viewBox="0 0 60 18" aria-hidden="true"><polyline points="{" ".join(points)}"/></svg>'


def _href(name: str) -> str:
    return quote(name, errors="surrogateescape")


def _last(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]

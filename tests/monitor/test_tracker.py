"""Which line of metrics.jsonl comes to which run of a tracker."""

from sae_dist.monitor.tracked import Artifact, TrackedRun
from sae_dist.monitor.tracker import History


class Heard:
    """A Tracker that only remembers."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, dict]]] = {}
        self.final: dict[str, dict] = {}
        self.said: list[tuple] = []

    def log(self, run, step, time, figures) -> None:
        self.history.setdefault(run.id, []).append((step, dict(figures)))

    def conclude(self, run, figures) -> None:
        self.final[run.id] = dict(figures)

    def alert(self, run, title, text) -> None:
        self.said.append((run.id, title, text))

    def link(self, run, artifact) -> None:
        self.said.append((run.id, artifact))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


RUNS = [
    TrackedRun("h", "run-harvest", "g", "harvest", "", {}), TrackedRun("main", "run", "g", "train", "", {}),
    TrackedRun("wide", "run-wide", "g", "train", "wide/", {}), TrackedRun("e", "run-evaluate", "g", "evaluate", "", {}),
]  # fmt: skip


def line(step: int, **figures) -> dict:
    return {"step": step, "time": 1.0, "tokens": step, **figures}


def test_a_dictionary_has_its_own_figures_and_those_of_the_run():
    heard = Heard()
    History(RUNS, heard).begin([line(1, fvu=0.5, threshold=2.0, **{"wide/fvu": 0.4})])
    assert heard.history == {
        "main": [(1, {"tokens": 1, "fvu": 0.5, "threshold": 2.0})], "wide": [(1, {"tokens": 1, "fvu": 0.4})],
    }  # fmt: skip


def test_steps_that_were_done_again_are_there_once():
    heard = Heard()
    history = History(RUNS[1:2], heard)
    history.begin([line(1, fvu=0.5), line(2, fvu=0.4), line(2, fvu=0.41), line(1, fvu=0.51)])
    history.go_on([line(2, fvu=0.41), line(3, fvu=0.3)])
    assert [(step, figures["fvu"]) for step, figures in heard.history["main"]] == [(1, 0.51), (2, 0.41), (3, 0.3)]


def test_other_phases_go_to_runs_of_their_own():
    heard = Heard()
    harvest = {"phase": "harvest", "time": 1.0, "tokens": 3, "replica0/units": 1}
    History(RUNS, heard).begin([
        harvest, harvest | {"tokens": 4}, {"phase": "start", "time": 0.0, "out": "x"},
        {"phase": "evaluate", "time": 2.0, "prefix": "", "fvu": 0.3, "tokens_trained": 9},
        {"phase": "artifact", "time": 2.0, "prefix": "wide/", "kind": "dictionary", "uri": "file:///d", "digest": "ab"},
    ])  # fmt: skip
    assert [step for step, _ in heard.history["h"]] == [0, 1]
    assert heard.history["e"] == [(0, {"fvu": 0.3, "tokens_trained": 9})]
    assert heard.final == {"main": {"eval/fvu": 0.3, "eval/tokens_trained": 9}}
    assert heard.said == [("wide", Artifact("dictionary", "file:///d", "ab"))]


def test_alerts_are_sent_once_and_not_again_with_the_history():
    heard = Heard()
    history = History(RUNS, heard)
    history.begin([line(1, alert="over")])
    history.go_on([
        line(2, alert="a"), line(3, **{"wide/alert": "b"}), {"phase": "alert", "time": 1.0, "alert": "c"},
        {"phase": "harvest", "time": 1.0, "harvest/alert": "d"},
    ])  # fmt: skip
    assert heard.said == [
        ("main", "run: step 2", "a"), ("wide", "run-wide: step 3", "b"), ("main", "run", "c"),
        ("h", "run-harvest", "d"),
    ]  # fmt: skip

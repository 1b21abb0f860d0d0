"""A sweep as a command: four points in one pass over rows that lie on S3, and what each of them leaves."""

import functools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.monitor.metrics import read_metrics
from sae_dist.service import sweep_driver
from sae_dist.storage import s3
from sae_dist.sweep.folder import read_points
from sae_dist.sweep.ledger import driving
from tests.monitor.tracking import runs
from tests.shards import seaweedfs
from tests.shards.s3_double import S3Double
from tests.sweep.test_sweep_run import outcomes
from tests.train.test_loop import full_store

KEYS = [
    "store=s3://bucket/store", "sae.n_latents=48", "train.steps=40", "train.batch=64", "train.init_rows=256",
    "train.checkpoint_every=20", "train.log_every=10", "wandb.mode=disabled",
]  # fmt: skip
SECRET = "alerts.webhook=http://127.0.0.1:9/secret"


class Swept(NamedTuple):
    """A sweep, a run of its second point alone, and how often each read rows."""

    out: Path
    alone: Path
    reads: dict[str, int]
    server: S3Double  # that has the store


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    with S3Double() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            patch.setenv(name, value)
        full_store("s3://bucket/store")
        reads = {}
        commands = {
            "sweep": ["sweep", "train", *KEYS, "sae=topk,batchtopk", "sae.k=2,4", "sweep.price_hour=36", SECRET],
            "alone": ["train", *KEYS, "sae=batchtopk", "sae.k=4"],
        }
        for name, command in commands.items():
            server.log.clear()
            assert main([*command, f"out={place / name}"]) == 0
            reads[name] = sum(method == "GET" and key.startswith("store/data/") for method, key in server.log)
        yield Swept(place / "sweep", place / "alone", reads, server)


def test_every_point_is_done_once_in_one_pass_over_the_rows(swept):
    points = read_points(swept.out)
    assert sorted(tuple(point.overrides.values()) for point in points) == [
        ("batchtopk", 2), ("batchtopk", 4), ("topk", 2), ("topk", 4),
    ]  # fmt: skip
    assert {(point.state, point.tries) for point in points} == {("done", 1)}
    assert len(list((swept.out / "passes").iterdir())) == 1
    assert swept.reads["sweep"] == swept.reads["alone"] > 0
    for point in points:
        assert point.seconds > 0 and point.cost == pytest.approx(point.seconds / 100, abs=1e-4)
        assert point.summary["eval"]["l0"] > 0


def test_a_point_is_the_run_that_training_it_alone_leaves(swept):
    (point,) = [each for each in read_points(swept.out) if [*each.overrides.values()] == ["batchtopk", 4]]
    own = swept.out / "points" / point.id
    assert sorted(path.name for path in own.iterdir()) == [
        "config.yaml", "dictionary", "metrics.jsonl", "status.json", "summary.json",
    ]  # fmt: skip
    for part in ("dictionary/dictionary.safetensors", "dictionary/config.json"):
        assert (own / part).read_bytes() == (swept.alone / part).read_bytes()

    def said(folder: Path) -> dict:
        times = ("name", "dictionary", "wall_seconds", "tokens_per_second")
        return {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k not in times}

    assert said(own) == said(swept.alone) == {k: v for k, v in point.summary.items() if k in said(own)}

    def figures(folder: Path) -> list[dict]:
        return [
            {k: v for k, v in line.items() if k not in ("time", "tokens_per_second", "seconds")
             and not k.startswith(("checkpoint", "starved", "blocked"))}
            for line in read_metrics(folder / "metrics.jsonl")
        ]  # fmt: skip

    assert figures(own) == figures(swept.alone)
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) | {"out": ""} for folder in (own, swept.alone)]
    assert configs[0] == configs[1]


def test_commands_about_runs_work_on_a_point(swept, capsys):
    point = read_points(swept.out)[0]
    own, overrides = swept.out / "points" / point.id, [f"{key}={value}" for key, value in point.overrides.items()]
    before = (own / "summary.json").read_bytes()
    assert main(["status", str(own)]) == 0
    assert "done" in capsys.readouterr().out
    assert main(["evaluate", str(own)]) == 0
    assert main(["train", *KEYS, *overrides, f"out={own}"]) == 0  # finished: nothing is trained
    assert (own / "summary.json").read_bytes() == before


def test_the_webhooks_address_is_in_no_file_of_a_sweep(swept):
    assert [path for path in swept.out.rglob("*") if path.is_file() and b"9/secret" in path.read_bytes()] == []


def test_the_status_of_a_sweep_has_a_row_a_point(swept, tmp_path, capsys):
    assert main(["status", str(swept.out)]) == 0
    head, bar, columns, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("sweep: 4 done, 0:0") and "cost 0.0" in head and "100%" in bar
    assert columns.split() == ["sae", "sae.k", "state", "FVU", "L0", "dead", "time", "point"]
    assert [row.split()[:3] for row in rows] == [[kind, k, "done"] for kind in ("batchtopk", "topk") for k in "24"]


def test_the_status_of_a_sweep_that_was_copied_to_object_storage(swept, capsys):
    there = storage.open("s3://bucket/sweeps/mine")
    for path in swept.out.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml") and "text" not in path.parts:
            there.write(path.relative_to(swept.out).as_posix(), path.read_bytes())
    shown = {}
    for place in (swept.out, there.uri):
        assert main(["status", str(place)]) == 0
        shown[place] = capsys.readouterr().out.splitlines()
    assert shown[there.uri][0].startswith("mine: 4 done, ")
    assert shown[there.uri][1:] == shown[swept.out][1:]
    assert main(["status", "s3://bucket/sweeps"]) == 0
    assert capsys.readouterr().out.startswith("sweep mine: 4 done, ")


def test_the_status_of_a_folder_lists_its_runs_and_its_sweeps(swept, capsys):
    assert main(["status", str(swept.out.parent)]) == 0
    _, run, sweep = capsys.readouterr().out.splitlines()
    assert run.split()[0::5] == ["done", "alone"] and sweep.startswith("sweep sweep: 4 done, ")
    assert main(["status", str(swept.out.parent), "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sweeps"] == [{"place": str(swept.out), "counts": {"done": 4}, "over": True}]
    assert [run["state"] for run in found["runs"]] == ["done"]


def test_the_status_of_a_sweep_names_what_keeps_it_from_its_end(swept, tmp_path, capsys):
    copy = shutil.copytree(swept.out, tmp_path / "sweep")
    broken, gone, *_ = read_points(copy)
    (copy / "points" / broken.id / "summary.json").write_text("{")
    shutil.rmtree(copy / "points" / gone.id)
    with driving(storage.open(copy)) as ledger:
        ledger.refresh()
        for point, outcome in (("a" * 12, "failed"), ("b" * 12, None)):
            ledger.add(point, {"sae": "topk", "sae.k": 64})
            taken = ledger.take(point, together=1)
            assert taken is not None and (outcome is None or ledger.end(taken, outcome, failure="RuntimeError: no"))
        assert main(["status", str(copy), "json=true"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["counts"] == {"done": 3, "pending": 1, "failed": 1, "leased": 1}
        assert main(["status", str(copy)]) == 0
        assert ": 3 done, 1 at work, 1 pending, 1 failed, " in capsys.readouterr().out
    assert main(["status", str(copy), "watch=true"]) == 0  # over: no driver is there any more
    said = capsys.readouterr().out
    assert "3 done, 2 pending, 1 failed" in said
    assert f"! {copy}/points/{broken.id}/summary.json is damaged: it is not whole JSON" in said
    assert "! nobody works on 2 pending points\n    -> the same command goes on\n       sae-dist sweep train " in said
    assert "! aaaaaaaaaaaa failed (sae=topk sae.k=64): RuntimeError: no" in said
    assert "retry=failed" in said


@pytest.mark.slow
def test_wandb_has_the_tables_and_plots_of_the_report(swept, tmp_path, capsys):
    out = shutil.copytree(swept.out, tmp_path / "sweep")
    again = [each for each in KEYS if not each.startswith("wandb.")] + ["sae=topk,batchtopk", "sae.k=2,4"]
    assert main(["sweep", "train", *again, "wandb.mode=offline", "sweep.extrapolate_to=96", f"out={out}"]) == 0
    (sent,) = runs(out).values()
    assert (sent.name, sent.group, sent.job_type) == ("sweep-sweep", "sweep", "sweep")
    plots = {name.split("/")[1] for name in sent.summary if name.startswith("plots/")}
    assert plots == {path.stem for path in (out / "report/plots").glob("*.svg")} >= {"fvu_by_k"}
    files = next((out / "wandb").glob("offline-run-*/files"))
    assert "<svg" in (files / sent.summary["plots/fvu_by_k/path"]).read_text()
    table = json.loads((files / sent.summary["tables/points/path"]).read_text())
    assert sorted(row[0] for row in table["data"]) == sorted(point.id for point in read_points(out))
    assert main(["sync", str(out), "wandb.mode=offline"]) == 0
    assert f"sweep     {sent.id}  sweep-sweep\nto upload: wandb sync {out}/wandb/offline-" in capsys.readouterr().out
    shutil.rmtree(out / "report")
    assert main(["sync", str(out), "wandb.mode=offline"]) == 2
    assert "has no report yet; repeat the sweep's command" in capsys.readouterr().err


def test_repeating_the_command_does_nothing_and_fewer_values_leave_the_other_points(swept, capsys):
    def records() -> list[Path]:
        return sorted(path for path in swept.out.glob("ledger/*/*.json") if path.parent.name != "drivers")

    ledger = records()
    assert main(["sweep", "train", *KEYS, "sae=topk", "sae.k=2,4", f"out={swept.out}"]) == 0
    assert capsys.readouterr().out.count("done") == 2
    assert records() == ledger and len(ledger) == 3 * 4
    assert len(read_points(swept.out)) == 4
    about = json.loads((swept.out / "sweep.json").read_text())
    assert about["command"] == "train" and about["keys"] == ["sae", "sae.k"] and len(about["lines"]) == 2


@pytest.mark.slow
def test_a_pass_that_ends_while_storage_is_away_is_handed_out_later_and_not_trained_again(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "S3Config", functools.partial(s3.S3Config, retry_s=0.1, pause_s=0.01))
    monkeypatch.setattr(sweep_driver, "PAUSE_S", 0.1)
    hand_out, begin, handed, begun = sweep_driver.hand_out, sweep_driver._process, [], []

    def with_storage_away_at_first(path, points):
        handed.append(path)
        rules = [swept.server.fail("503", key="store/store.json")] if len(handed) == 1 else []
        try:
            return hand_out(path, points)
        finally:
            for rule in rules:
                swept.server.rules.remove(rule)

    monkeypatch.setattr(sweep_driver, "hand_out", with_storage_away_at_first)
    monkeypatch.setattr(sweep_driver, "_process", lambda *given: begun.append(given) or begin(*given))
    assert main(["sweep", "train", *KEYS, "sae.k=2,4", f"out={tmp_path / 'sweep'}"]) == 0
    assert list(outcomes(tmp_path / "sweep").values()) == [["stopped", "done"]] * 2
    assert (len(handed), len(begun)) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sae.k=2,30"], "sae.k=30: sae.k=30 exceeds d_model=24"),
        (["sae.k=2,4", "only=zz"], "only=zz is none of the points that the keys make"),
        (["sae.k=4", "train.log_every=1,2"], "come to the same dictionary: this key only says where or how fast"),
        (["sae.k=2,4", "mirror=s3://bucket/mine"], "mirror=s3://bucket/mine is the copy of one run; leave it out"),
        (["sae.k=4", "more_dictionaries=[{k: 8}]"], "more_dictionaries= is what a sweep makes of its points"),
    ],
)
def test_what_cannot_be_swept_is_one_line_and_exit_2_before_anything_starts(swept, tmp_path, capsys, arguments, said):
    assert main(["sweep", "train", *KEYS, f"out={tmp_path / 'new'}", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_refused(swept, capsys):
    assert main(["sweep", "train", *KEYS, "sae.k=2,4", f"out={swept.alone}"]) == 2
    assert "holds a run, not a sweep" in capsys.readouterr().err

"""metrics.jsonl is the truth and W&B cannot hurt."""

import subprocess
import sys
import time

import pytest

from sae_dist.config import UserError, load
from sae_dist.monitor.config import WandbConfig
from sae_dist.monitor.metrics import JsonLines, newest_metrics, read_metrics
from sae_dist.monitor.mirror import WandbMirror
from sae_dist.run_files import write_json


def test_lines_of_other_phases_do_not_get_between_the_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train, harvest = JsonLines(path), JsonLines(path, phase="harvest")
    train(10, {"fvu": 0.5})
    harvest(4096, {"units": 1})
    train.close()
    harvest.close()
    assert [entry["step"] for entry in read_metrics(path)] == [10]
    assert newest_metrics(path)["fvu"] == 0.5
    assert '{"phase": "harvest", ' in path.read_text()


def test_lines_come_back_in_order_and_a_step_done_again_counts_as_done_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step, fvu in [(10, 0.5), (20, 0.4), (30, 0.3), (20, 0.41), (30, 0.31)]:
        log(step, {"fvu": fvu})
    log.close()
    assert [(entry["step"], entry["fvu"]) for entry in read_metrics(path)] == [(10, 0.5), (20, 0.41), (30, 0.31)]
    assert newest_metrics(path)["fvu"] == 0.31


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fv')
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    JsonLines(path).close()  # a run that went on and died before its first line
    assert newest_metrics(path)["step"] == 1
    assert newest_metrics(path)["step"] == 1


def test_the_line_after_a_cut_one_stands_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fv')
    log = JsonLines(path)
    log(2, {"fvu": 0.4})
    log.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    "line", ["[1]", "7", '{"step": "a"}', '{"fvu": 1}', '{"step": 1, "fvu": [1]}', '{"step": 1e99}']
)
def test_a_line_that_no_run_wrote_is_refused_by_name(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "fvu": 0.5}}\n{line}\n')
    for read in (read_metrics, newest_metrics):
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: .* remove that line"):
            read(path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a" / "status.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "status.json", {"x": object()})
    assert (tmp_path / "a" / "status.json").read_text() == '{\n  "x": 1\n}\n'


def mirror(tmp_path) -> WandbMirror:
    return WandbMirror(WandbConfig(), out=tmp_path, name="run", run_config={"a": 1})


def test_wandb_offline_keeps_a_run_in_the_runs_folder(tmp_path, caplog):
    log = mirror(tmp_path)
    for step in range(20):
        log(step, {"tokens": step * 10, "fvu": 1 / (step + 1)})
    log(20, {"tokens": 200, "wide/alert": "the loss jumped to 7"})
    log.close(timeout_s=60)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"run: step 20" in kept.read_bytes()  # the alert's title
    assert not caplog.records


@pytest.mark.parametrize(
    ("environment", "given", "mode"),
    [({}, None, "offline"), ({"WANDB_MODE": "disabled"}, None, "disabled"), ({"WANDB_MODE": "dryrun"}, None, "offline"),
     ({"WANDB_MODE": "disabled"}, "online", "online"), ({"WANDB_MODE": ""}, None, "offline")],
)  # fmt: skip
def test_the_mode_is_the_one_that_is_given_else_the_environments(monkeypatch, environment, given, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load(WandbConfig, {"mode": given}).mode == mode
    assert environment or WandbConfig().mode == mode


def test_a_mode_of_the_environment_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="mode='sometimes': give 'offline', 'online' or 'disabled'"):
        load(WandbConfig, {})


def test_without_a_key_it_is_said_while_the_run_works(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    log = WandbMirror(load(WandbConfig, {"mode": "online"}), out=tmp_path, name="run", run_config={})
    log(0, {"tokens": 0})
    deadline = time.monotonic() + 120
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "W&B has ended" in caplog.text and "metrics.jsonl has all" in caplog.text
    assert "api_key" in caplog.text.lower() or "wandb login" in caplog.text
    log.close()
    assert len(caplog.records) == 1


KILLED = """
import sys, time, pathlib, psutil
from sae_dist.monitor.config import WandbConfig
from sae_dist.monitor.mirror import WandbMirror
log = WandbMirror(WandbConfig(), out=pathlib.Path(sys.argv[1]), name="run", run_config={})
log(0, {"tokens": 0})
while not (service := [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]):
    time.sleep(0.05)
for process in service:
    process.kill()
for step in range(1, 2000):
    log(step, {"tokens": step})
log.close(timeout_s=30)
print("the run goes on to its end")
"""


def test_killing_wandbs_service_costs_a_warning_and_no_more(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "the run goes on to its end\n"
    assert "metrics.jsonl has all" in done.stderr

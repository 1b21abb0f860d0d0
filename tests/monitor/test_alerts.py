"""When an alert is raised, from lines of metrics.jsonl alone; and where it goes."""

import http.server
import json
import logging
import resource
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sae_dist.monitor import watch, webhook
from sae_dist.monitor.alerts import Alert, Episodes, decide
from sae_dist.monitor.config import AlertsConfig
from sae_dist.monitor.metrics import JsonLines
from sae_dist.monitor.watch import Watch
from sae_dist.monitor.webhook import Webhook

START = {"phase": "start", "time": 0.0, "steps": 1000}


def training(time: float, **figures) -> dict:
    return {"step": int(time), "time": time, "starved_seconds": 0.0, "seconds": time, "dead_fraction": 0.0, **figures}


def harvest(time: float, units: int, held_s: float = 0.0) -> dict:
    return {"phase": "harvest", "time": time, "units": units, "of": 10, "held_s": held_s}


def names(history: list[dict], *, now: float | None = None, disk_free: float | None = None, **keys) -> list[str]:
    now = history[-1]["time"] if now is None else now
    return [alert.name for alert in decide(history, AlertsConfig(**keys), now=now, disk_free=disk_free)]


def test_training_is_starved_when_it_waits_a_fifth_of_five_minutes():
    waits = [training(float(t), starved_seconds=0.3 * t) for t in range(0, 400, 10)]
    assert names([START, *waits]) == ["starved"]
    assert names([START, *waits[:20]]) == []  # not for long enough
    assert names([START, *(training(float(t), starved_seconds=0.1 * t) for t in range(0, 400, 10))]) == []
    over = [training(float(t), starved_seconds=0.3 * min(t, 400)) for t in range(0, 800, 10)]
    assert names([START, *over]) == []  # it was, and is not any more
    assert names([START, *waits], starved=None) == []


def test_no_line_for_long_is_an_alert_while_something_is_left_to_do():
    assert names([START], now=1801) == ["stalled"]
    assert names([START, training(10.0)], now=1900) == ["stalled"]
    assert names([START, training(10.0, step=1000)], now=1e6) == []  # trained: evaluation and pages say nothing
    assert names([START | {"steps": None}, harvest(10, 10)], now=1e6) == []
    assert names([START, training(10.0)], now=1900, stalled_s=None) == []


def test_a_harvest_without_a_commit_is_an_alert_unless_it_waits_for_its_readers():
    working = [harvest(float(t), 3) for t in range(0, 2000, 100)]
    assert names([START | {"steps": None}, *working]) == ["no_commit"]
    assert names([START | {"steps": None}, *working[:10]]) == []
    held = [harvest(float(t), 3, held_s=0.9 * t) for t in range(0, 2000, 100)]
    assert names([START | {"steps": None}, *held]) == []
    assert names([START | {"steps": None}, *working, harvest(2000.0, 4)]) == []


def test_dead_latents_money_and_the_disk():
    line = training(7200.0, dead_fraction=0.6, **{"wide/dead_fraction": 0.7, "k8/dead_fraction": None})
    assert names([START, line]) == ["/dead", "wide/dead"]
    assert names([START, line], dead=None, cost=3.0, price_per_hour=2.0) == ["cost"]
    assert names([START, line], dead=None, cost=5.0, price_per_hour=2.0) == []
    assert names([START, line], dead=None, disk_free=0.04) == ["disk"]
    assert names([START, line], dead=None, disk_free=0.06) == []


def test_an_alert_is_raised_once_an_episode():
    episodes, dead = Episodes(), Alert("/dead", "60 % dead")
    told = [episodes.new(now) for now in ([dead], [dead], [], [dead._replace(text="70 % dead")])]
    assert [[alert.text for alert in new] for new in told] == [["60 % dead"], [], [], ["70 % dead"]]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """A server that a webhook may be, and what was posted to it."""
    posted: list[dict] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/secret", posted
        serving.shutdown()
        thread.join()


def test_alerts_go_to_the_log_to_metrics_and_to_the_webhook(tmp_path, server, caplog, monkeypatch):
    url, posted = server
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.01)
    earlier = JsonLines(tmp_path / "metrics.jsonl")
    earlier(1, {"dead_fraction": 0.9, "alert": "of the attempt before"})
    watching = Watch(AlertsConfig(webhook=url), tmp_path)
    with_alerts = {"starved_seconds": 0.0, "seconds": 1.0, "dead_fraction": 0.6, "wide/alert": "the loss jumped to 7"}
    for step in (2, 3):
        earlier(step, with_alerts if step == 2 else with_alerts | {"wide/alert": "and again"})
        time.sleep(0.05)
    watching.close()
    earlier.close()
    said = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"phase": "alert"' in line]
    assert len(said) == 1 and json.loads(said[0])["name"] == "/dead"
    assert [record.getMessage() for record in caplog.records] == [f"ALERT: {json.loads(said[0])['alert']}"]
    texts = sorted(alert["text"] for alert in posted)
    name = tmp_path.name
    dead = f"{name}: 60% of the latents are dead; lower train.lr or sae.n_latents"
    assert texts == sorted([dead, f"{name}: wide: the loss jumped to 7", f"{name}: wide: and again"])
    assert {alert["run"] for alert in posted} == {name}


def wait_until(true: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_alert_that_a_full_disk_did_not_take_is_written_and_sent_once_there_is_room(
    tmp_path, server, caplog, monkeypatch
):
    url, posted = server
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.01)
    line = json.dumps(training(0.0, dead_fraction=0.6) | {"time": time.time()}).encode() + b"\n"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) + 20, limits[1]))  # takes this line and no other
    try:
        watching = Watch(AlertsConfig(webhook=url), tmp_path)
        path.write_bytes(line)
        wait_until(lambda: len(caplog.records) >= 2)
        time.sleep(0.1)  # for several more looks
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wait_until(lambda: posted)
    watching.close()
    dead, held_up = [record.getMessage() for record in caplog.records]
    assert dead.startswith("ALERT: 60% of the latents are dead") and "No space left on device" in held_up
    (_, written) = map(json.loads, path.read_text().splitlines())
    assert dead == f"ALERT: {written['alert']}" and len(posted) == 1


def test_a_webhook_that_does_not_answer_costs_one_line_without_its_address(caplog, monkeypatch):
    monkeypatch.setattr(webhook, "WAITING", 2)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as deaf:  # accepts, never answers
        monkeypatch.setattr(webhook, "ANSWER_S", 0.2)
        hook = Webhook(f"http://127.0.0.1:{deaf.server_port}/secret")
        began = time.monotonic()
        for _ in range(50):
            hook.post({"text": "something"})
        assert time.monotonic() - began < 0.2  # nobody waits
        while hook.lost < 50 and time.monotonic() - began < 30:  # the last ones are still on their way
            time.sleep(0.05)
        hook.close()
    assert hook.lost == 50
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "127.0.0.1" in record.getMessage() and "secret" not in record.getMessage()

"""The newest figures, asked for over HTTP as Prometheus does."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sae_dist.config import UserError
from sae_dist.monitor.config import PrometheusConfig
from sae_dist.monitor.metrics import JsonLines
from sae_dist.monitor.prometheus import endpoint


def ask(port: int | None) -> dict[tuple[str, str], float]:
    """Every sample by its name and its part."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(sample.name, sample.labels["part"]): sample.value for each in families for sample in each.samples}


def test_the_newest_line_of_every_phase_is_there(tmp_path):
    train, harvest = (JsonLines(tmp_path / "metrics.jsonl", phase=phase) for phase in ("train", "harvest"))
    with endpoint(PrometheusConfig(port=0), tmp_path) as port:
        assert ask(port) == {}
        for step in (10, 20):
            train(step, {"fvu": 1 / step, "wide/fvu": 0.5, "order_hash": "ab", "density_histogram": [1, 2], "lr": None})
        harvest(1, {"units": 3, "replica0/tokens_per_second": 7.0})
        found = ask(port)
        train(30, {"fvu": 0.1})
        assert ask(port)["sae_dist_train_step", ""] == 30
    del found["sae_dist_train_time", ""], found["sae_dist_harvest_time", ""]
    assert found == {
        ("sae_dist_train_step", ""): 20, ("sae_dist_train_fvu", ""): 0.05, ("sae_dist_train_fvu", "wide"): 0.5,
        ("sae_dist_harvest_units", ""): 3, ("sae_dist_harvest_tokens_per_second", "replica0"): 7,
    }  # fmt: skip
    train.close()
    harvest.close()


def test_only_this_machine_may_ask_unless_told_otherwise(tmp_path):
    assert PrometheusConfig().port is None and PrometheusConfig().address == "127.0.0.1"
    with endpoint(PrometheusConfig(port=0), tmp_path) as port, pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port or 0), timeout=5).close()  # this machine by another address
    with endpoint(PrometheusConfig(), tmp_path) as port:
        assert port is None


def test_a_port_that_is_taken_is_refused_by_name(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = pytest.raises(UserError, match=f"prometheus.port={port} at .* cannot be had")
        with refused, endpoint(PrometheusConfig(port=port), tmp_path):
            pass

"""The newest figures of a run over HTTP, as Prometheus asks for them; read from metrics.jsonl when somebody asks."""

import logging
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sae_dist.config import UserError
from sae_dist.monitor.config import PrometheusConfig
from sae_dist.monitor.metrics import Follower

logger = logging.getLogger(__name__)


@contextmanager
def endpoint(config: PrometheusConfig, out: Path) -> Iterator[int | None]:
    """Serves /metrics while the context lasts; the port, None where none is asked for. UserError: it is taken."""
    if config.port is None:
        yield None
        return
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Newest(out))
    try:
        server, thread = start_http_server(config.port, config.address, registry)
    except OSError as error:
        raise UserError(
            f"prometheus.port={config.port} at prometheus.address={config.address} cannot be had ({error.strerror}); "
            "choose another, 0 for a free one, or null for none"
        ) from None
    try:
        logger.info("Prometheus may ask http://%s:%d/metrics", config.address, server.server_port)
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Newest(Collector):
    """The last line of every phase as gauges `sae_dist_<phase>_<figure>`; labels: the run, and the part that it is of.

    A part is a dictionary of a pass, or a replica of a harvest; empty: the main dictionary, or the whole.
    """

    def __init__(self, out: Path) -> None:
        self._run, self._follower = out.name, Follower(out / "metrics.jsonl")
        self._newest: dict[str, dict[str, Any]] = {}
        self._asking = threading.Lock()

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing before somebody asks."""
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        with self._asking:
            while part := self._follower.read():
                self._newest |= {entry.get("phase", "train"): entry for entry in part}
            newest = dict(self._newest)
        gauges: dict[str, GaugeMetricFamily] = {}
        for phase in ("train", "harvest"):
            for key, value in newest.get(phase, {}).items():
                part, _, figure = key.rpartition("/")
                name = re.sub(r"\W", "_", f"sae_dist_{phase}_{figure}")
                if isinstance(value, int | float):
                    gauge = gauges.setdefault(name, GaugeMetricFamily(name, figure, labels=("run", "part")))
                    gauge.add_metric((self._run, part), value)
        return gauges.values()

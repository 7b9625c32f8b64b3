"""`/metrics` in Prometheus' text format, from the same numbers that `dadi status` shows.

A component has one `statistics()`; this turns its nested numbers into metrics named by their path, so that there is no
second set of counters that could disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest


class StatisticsCollector:
    """Yields `{prefix}_{path}` for each number in the nested dict; and `{prefix}_fallbacks{kind=…}`."""

    def __init__(self, prefix: str, statistics: Callable[[], dict[str, Any]]) -> None:
        self._prefix = prefix
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        statistics = dict(self._statistics())
        fallbacks = GaugeMetricFamily(f"{self._prefix}_fallbacks", "Fallbacks since the start", labels=["kind"])
        for row in statistics.pop("fallbacks", []):
            fallbacks.add_metric([row["kind"]], row["count"])
        yield fallbacks
        for name, value in _numbers(statistics, self._prefix):
            yield GaugeMetricFamily(name, name.removeprefix(self._prefix).replace("_", " ").strip(), value=value)


def _numbers(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        name = f"{prefix}_{key}".replace("-", "_").replace(".", "_").replace(" ", "_")
        if isinstance(value, dict):
            yield from _numbers(value, name)
        elif isinstance(value, bool | int | float):
            yield name, float(value)


def handler(prefix: str, statistics: Callable[[], dict[str, Any]]) -> Callable[[web.Request], Any]:
    """Return the aiohttp handler for `/metrics`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatisticsCollector(prefix, statistics))

    async def metrics(request: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return metrics

"""The gateway's metrics, in a registry of their own: what the engine reports, and what requests looked like here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from coserve.server.telemetry.catalogue import ENGINE_COUNTERS, ENGINE_GAUGES, ITL_BUCKETS, TTFT_BUCKETS
from coserve.server.wire.messages import DEADLINE_EXCEEDED, Stats, Tokens

if TYPE_CHECKING:
    from coserve.server.gateway.engine_client import EngineClient
    from coserve.server.gateway.generation import Generation

_SERIES = re.compile(r'([a-z_][a-z0-9_]*)(?:\{([a-z_][a-z0-9_]*="[^"\\\n]*"(?:,[a-z_][a-z0-9_]*="[^"\\\n]*")*)\})?')
_LABEL = re.compile(r'([a-z_][a-z0-9_]*)="([^"]*)"')


class Metrics:
    """One a process. `exposition` is cheap; nothing here waits."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._engine = _EngineCollector()
        self._registry.register(self._engine)
        self._itl = Histogram(
            "coserve_itl_seconds", "Seconds between a stream's tokens, where the engine delivers them",
            ["slo_class"], buckets=ITL_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._ttft = Histogram(
            "coserve_ttft_seconds", "Seconds from a request's arrival at the server to its first token",
            ["slo_class"], buckets=TTFT_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._requests = Counter(
            "coserve_generation_requests", "Generation requests by what became of them", ["result"],
            registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "coserve_generation_tokens",
            "Tokens of generation requests, by kind: prompt, cached, computed, completion, sampled", ["kind"],
            registry=self._registry,
        )  # fmt: skip
        self._slo = Counter(
            "coserve_slo_requests", "Requests inside both promises, and requests that were not or got no answer",
            ["result"], registry=self._registry,
        )  # fmt: skip
        self._attainment = Gauge(
            "coserve_slo_attainment", "Share of requests inside both promises since the start", registry=self._registry
        )
        self._met = self._missed = 0

    def watch(self, engine: EngineClient) -> None:
        """Follows an engine's reports."""
        engine.subscribe(Stats, self.observe)
        sampled = self._tokens.labels("sampled")  # of every sequence, whether anybody still reads it or not
        engine.subscribe(Tokens, lambda tokens: sampled.inc(len(tokens.token_ids)))
        up = Gauge("coserve_engine_up", "1 while an engine is connected and heard of", registry=self._registry)
        up.set_function(lambda: float(engine.ready))
        waiting = Gauge("coserve_gateway_waiting", "Sequences without a first token", registry=self._registry)
        waiting.set_function(lambda: float(engine.waiting))

    def observe(self, stats: Stats) -> None:
        self._engine.latest = stats
        for slo_class, seconds in stats.itl:
            self._itl.labels(_known_class(slo_class)).observe(seconds)
        for slo_class, seconds in stats.ttft:
            self._ttft.labels(_known_class(slo_class)).observe(seconds)

    def finished(self, generation: Generation) -> None:
        """A generation ended, whichever way."""
        usage = generation.usage
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("computed").inc(usage.computed_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        ended = "completed" if generation.done else "aborted"
        result = {None: ended, DEADLINE_EXCEEDED: "expired"}.get(generation.failure, "failed")
        self._requests.labels(result).inc()
        if result != "aborted":  # a client that left was promised nothing more
            self._attain(result == "completed" and _inside(generation))

    def refused(self) -> None:
        """A request was turned away: a miss of the promise too."""
        self._requests.labels("refused").inc()
        self._attain(False)

    def _attain(self, met: bool) -> None:
        self._slo.labels("met" if met else "missed").inc()
        self._met, self._missed = self._met + met, self._missed + (not met)
        self._attainment.set(self._met / (self._met + self._missed))

    def exposition(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


def _inside(generation: Generation) -> bool:
    promise = generation.request.promise
    if generation.first_token_at is None or generation.last_token_at is None:
        return False
    if generation.first_token_at - generation.arrived > promise.ttft:
        return False
    longest = max(choice.completion_tokens for choice in generation.choices)
    decoding = generation.last_token_at - generation.first_token_at
    return longest < 2 or decoding / (longest - 1) <= promise.itl


def _known_class(slo_class: str) -> str:
    return slo_class if slo_class in ("interactive", "batch") else "other"


class _EngineCollector:
    """Exposes the counters and gauges of the latest Stats under their own names."""

    def __init__(self) -> None:
        self.latest: Stats | None = None

    def collect(self) -> Iterable[Metric]:
        if self.latest is None:
            return []
        counters = _families(self.latest.counters, ENGINE_COUNTERS, CounterMetricFamily)
        gauges = _families(self.latest.gauges, ENGINE_GAUGES, GaugeMetricFamily)
        return [*counters, *gauges, *self._share(self.latest.counters)]

    def _share(self, counters: Mapping[str, float]) -> list[Metric]:
        """Of the iterations with a running stream, those that kept the inter-token budget."""
        streams = counters.get("coserve_iterations_with_streams_total", 0)
        if not streams:
            return []
        share = counters.get("coserve_iterations_in_slo_total", 0) / streams
        text = "Share of iterations with a running stream that kept the inter-token budget, since the engine's start"
        return [GaugeMetricFamily("coserve_iteration_slo_share", text, value=share)]


def _families(
    values: Mapping[str, float], known: Mapping[str, str], kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
) -> list[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for series, value in sorted(values.items()):
        match = _SERIES.fullmatch(series)
        if match is None:
            continue  # not a series' name: exposing it would spoil the whole page
        name = match[1]
        labels = dict(_LABEL.findall(match[2] or ""))
        family = families.get(name)
        if family is None:
            family = families[name] = kind(name, known.get(name, ""), labels=list(labels))
        if tuple(labels) == family._labelnames:
            family.add_metric(list(labels.values()), value)
    return list(families.values())

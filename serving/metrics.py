"""What Prometheus reads at `/metrics`."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from .contract import Answer, Engine, Refusal
from .room import Room


SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Of one server.

    Attributes:
        labels: Of all of them, where servers are several: which one it is.
    """

    def __init__(self, engine: Engine, room: Room):
        self.registry = registry = CollectorRegistry()
        self.labels: dict[str, str] = {}
        self._requests = Counter("openvla_requests", "Requests that came.", ["protocol"], registry=registry)
        self._refusals = Counter(
            "openvla_refusals",
            "Requests that got no action; of protocol gate: those of clients that may not ask.",
            ["protocol", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "openvla_stage_seconds",
            "Time of a request: read (decode and check), queue, infer, and total (from the last byte that came to the "
            "answer).",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._stages: dict[str, Histogram] = {}  # to look one up takes longer than to count
        self._batch = Histogram(
            "openvla_batch_size",
            "Requests in the batch of each answer: a batch of 16 counts 16 times.",
            buckets=BATCHES,
            registry=registry,
        )
        Gauge("openvla_queue", "Requests that wait now.", registry=registry).set_function(engine.waiting)
        Gauge("openvla_ready", "1 if it answers.", registry=registry).set_function(lambda: float(engine.ready))
        Gauge(
            "openvla_predicting_seconds",
            "Time that the batch with the model has taken so far: one that hangs shows here first. 0: none.",
            registry=registry,
        ).set_function(engine.predicting)
        Gauge(
            "openvla_bodies_bytes", "Bodies and messages that come in or are answered now.", registry=registry
        ).set_function(lambda: room.taken)
        self._sockets = Gauge("openvla_websockets", "Robots that are connected.", registry=registry)

    def came(self, protocol: str) -> None:
        self._requests.labels(protocol).inc()

    def answered(self, answer: Answer) -> None:
        for name, value in answer.timing.items():
            if name == "batch_size":
                self._batch.observe(value)
            elif name.endswith("_ms"):
                if name not in self._stages:
                    self._stages[name] = self._seconds.labels(name.removesuffix("_ms"))
                self._stages[name].observe(value / 1000)

    def refused(self, protocol: str, refusal: Refusal) -> None:
        self._refusals.labels(protocol, refusal.code).inc()

    def connected(self, change: int) -> None:
        self._sockets.inc(change)

    def text(self) -> bytes:
        return generate_latest(self)  # type: ignore[arg-type]  # it calls `collect` alone

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            metric.samples = [sample._replace(labels={**self.labels, **sample.labels}) for sample in metric.samples]
            yield metric

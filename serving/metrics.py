"""What Prometheus reads at `/metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .contract import Answer, Engine, Refusal


SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Of one server."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
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
        self._sockets = Gauge("openvla_websockets", "Robots that are connected.", registry=registry)

    def came(self, protocol: str) -> None:
        self._requests.labels(protocol).inc()

    def answered(self, answer: Answer) -> None:
        for name, value in answer.timing.items():
            if name == "batch_size":
                self._batch.observe(value)
            elif name.endswith("_ms"):
                self._seconds.labels(name.removesuffix("_ms")).observe(value / 1000)

    def refused(self, protocol: str, refusal: Refusal) -> None:
        self._refusals.labels(protocol, refusal.code).inc()

    def connected(self, change: int) -> None:
        self._sockets.inc(change)

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""What predictions cost.

`subject`: what is measured, on which frames. `clock`: stages. `roofline`: what the hardware allows. `latency` (against
others of `other`), `throughput`, `startup` (memory and loading, in a process of their own), `exact`; `plot`.
"""

from typing import Any

from ..options.benchmark import BenchOptions


def bench(options: BenchOptions) -> tuple[dict[str, Any], str]:
    """The figures that were asked for, and their table."""
    from . import exact, latency, startup, throughput

    run, table = {
        "latency": (latency.latency, latency.table),
        "throughput": (throughput.throughput, throughput.table),
        "memory": (startup.startup, startup.table),
        "load": (startup.startup, startup.table),
        "exact": (exact.exact, exact.table),
    }[options.what]
    report = run(options)
    return report, table(report)

"""What predictions cost.

`subject`: what is measured, on which frames. `clock`: stages. `roofline`: what the hardware allows. `latency` (against
others of `other`), `throughput`, `startup` (memory and loading, in a process of their own), `exact`; `plot`. `mid`: a
model to measure with.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..extras import require
from ..folders import locked_file, write_json
from ..options.benchmark import BenchOptions


def bench(options: BenchOptions) -> tuple[dict[str, Any], str]:
    """The figures that were asked for, and their table.

    Raises:
        ModuleNotFoundError, OSError, ValueError: Before anything is measured, if they cannot be written to `output`.
        ValueError: See each of them.
    """
    if options.output is not None and options.what == "latency":
        if options.output.suffix.lower() == ".png":
            raise ValueError(
                f"output='{options.output}' is where the plot goes: give a .json, the plot stands beside it."
            )
        require("matplotlib", purpose="the plot beside --output", preferred="demo")
    with nullcontext() if options.output is None else locked_file(options.output) as output:
        return _bench(options, output)


def _bench(options: BenchOptions, output: Path | None) -> tuple[dict[str, Any], str]:
    from . import exact, latency, startup, throughput

    run, table = {
        "latency": (latency.latency, latency.table),
        "throughput": (throughput.throughput, throughput.table),
        "memory": (startup.startup, startup.table),
        "load": (startup.startup, startup.table),
        "exact": (exact.exact, exact.table),
    }[options.what]
    report = run(options)
    if output is not None:
        write_json(output, report)
        if options.what == "latency":
            from .plot import plot

            plot(report, output.with_suffix(".png"))
    return report, table(report)

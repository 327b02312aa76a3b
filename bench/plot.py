"""A picture of latency: for each way its stages, and what the hardware allows."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..data.statistics import literal
from ..folders import whole_file


COLORS = {
    "preprocessing": "tab:gray", "vision": "tab:blue", "prefill": "tab:orange", "decode": "tab:red",
    "answer": "tab:red", "other": "silver", "total": "tab:purple",
}  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    ways = list(reversed(report["ways"].items()))
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(ways)), layout="constrained")
    axes = figure.subplots()
    named = set()
    for place, (_, row) in enumerate(ways):
        left, parts = 0.0, {stage: found["min_ms"] for stage, found in row["stages"].items()}
        # Stages are of other frames than the total: they divide it.
        parts = {stage: width * row["min_ms"] / sum(parts.values()) for stage, width in parts.items()}
        for stage, width in (parts or {"total": row["min_ms"]}).items():
            label = None if stage in named else stage
            axes.barh(place, width, left=left, color=COLORS[stage], label=label)
            left += width
            named.add(stage)
        # Some stages have no weights; of quantized ones none is known, and what is left would be no limit of the whole.
        of_weights = [row["stages"][stage] for stage in ("vision", "prefill", "decode", "answer") if parts.get(stage)]
        limit = sum(found.get("limit_ms", 0.0) for found in of_weights)
        if limit and all("limit_ms" in found for found in of_weights):
            label = None if "limit" in named else "limit of the hardware"
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=2, label=label)
            named.add("limit")
        axes.text(left, place, f" {row['min_ms']:.1f}", va="center")
    axes.set_yticks(range(len(ways)), [literal(name) for name, _ in ways])
    axes.set_xlabel("ms for one prediction (least), divided as its stages are")
    axes.set_title(f"{literal(report['model'])}, {report['dtype']}, {report['device']}, {report['threads']} thread(s)")
    axes.margins(x=0.1)
    figure.legend(loc="outside right upper")
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format=path.suffix[1:].lower())

"""From records of episodes to a report: success with its uncertainty, lengths, latency; JSON, Markdown, a plot."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..data.statistics import literal
from ..folders import whole_file, write_json, write_text
from .environment import AXES


REPORT = ("report.json", "report.md", "report.png")
MOST_REASONS = 5  # why environments broke, in a report


class NoEpisodes(OSError):
    """Every environment broke: nothing was measured. The message says why."""

    exit_code = 1  # of the command line


@dataclass(frozen=True)
class EpisodeResult:
    """One episode as it went. `steps` of the world; `latency` mean seconds of one prediction; `error` where the
    environment broke, which counts as neither success nor failure; `jerk` of the executed actions, see
    `smoothness.mean_jerk`; `passes` of the language model for one prediction, the mean, where they are counted."""

    task: str
    episode: int
    seed: int
    instruction: str
    success: bool
    steps: int
    predictions: int
    latency: float
    error: str | None = None
    variation: str = ""
    jerk: float | None = None
    passes: float | None = None


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a success rate (Wilson score interval, E. B. Wilson 1927).

    Raises:
        ValueError: If there are no episodes, or more successes than those.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"{successes} successes in {episodes} episodes: expected 0 to all of at least one.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, spread = successes / episodes, z * z / episodes
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / episodes + spread / (4 * episodes)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarize(records: Iterable[EpisodeResult]) -> dict[str, Any]:
    """`{"rows": [of each task and variation], "axes": [of each axis], "mean_success", "episodes", "errors",
    "reasons"}`.

    `reasons`: why environments broke, the most frequent first, and how often; without paths, as reports are published.
    Rates are in [0, 1]. `mean_success` is the mean over rows, so that every task counts alike; the row of an axis pools
    all episodes of its kinds and tasks, each once, see `_once` ("none": those without variation).
    """
    groups: dict[tuple[str, str], list[EpisodeResult]] = {}
    axes: dict[str, list[EpisodeResult]] = {}
    reasons: Counter[str] = Counter()
    for record in records:
        if record.error is not None:
            reasons[without_paths(record.error)] += 1
        groups.setdefault((record.variation, record.task), []).append(record)
        axes.setdefault(record.variation.partition(":")[0], []).append(record)
    rows = [
        {"task": task, "variation": variation} | _counts(group) for (variation, task), group in sorted(groups.items())
    ]
    order = sorted(axes, key=lambda axis: (axis != "", AXES.index(axis) if axis in AXES else len(AXES), axis))
    pooled = [
        {"axis": axis or "none", "tasks": len({record.task for record in axes[axis]})}
        | _counts(_once(axis, axes[axis]))
        for axis in order
    ]
    rates = [row["success"] for row in rows if "success" in row]
    return {
        "rows": rows,
        "axes": pooled,
        "mean_success": float(np.mean(rates)) if rates else None,
        "episodes": sum(row["episodes"] for row in rows),
        "errors": sum(row["errors"] for row in rows),
        "reasons": dict(reasons.most_common(MOST_REASONS)),
    }


def _once(axis: str, group: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """The records of an axis without episodes that are there twice, which would make its interval too narrow.

    An axis alone draws one of its kinds: a task that was run so and by kind as well counts as it was run so. Episodes
    of one number that differ in words are the same where two kinds drew the same words.
    """
    drawn = {record.task for record in group if record.variation == axis}
    kept: dict[tuple[Any, ...], EpisodeResult] = {}
    for record in group:
        if record.task in drawn and record.variation != axis:
            continue
        differs = record.instruction if axis == "semantic" and record.error is None else record.variation
        kept.setdefault((record.task, record.episode, record.error, differs), record)
    return list(kept.values())


def without_paths(text: str) -> str:
    """`text` on one line of at most 300 characters, with the last name of each absolute path alone."""
    return re.sub(
        r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":,;]+[/\\])*(?=[^\s/\\])", "", " ".join(text.split())
    )[:300]


def _counts(group: Sequence[EpisodeResult]) -> dict[str, Any]:
    """What a row says of its episodes; no rates where all of them broke."""
    finished = [record for record in group if record.error is None]
    counts: dict[str, Any] = {"episodes": len(finished), "errors": len(group) - len(finished)}
    if finished:
        successes = sum(record.success for record in finished)
        low, high = wilson_interval(successes, len(finished))
        lengths = [record.steps for record in finished if record.success]
        counts |= {"successes": successes, "success": successes / len(finished), "low": low, "high": high}
        counts |= {"steps_of_successes": float(np.mean(lengths)) if lengths else None}
        counts |= {"latency": float(np.mean([record.latency for record in finished]))}
        jerks = [record.jerk for record in finished if record.jerk is not None]
        counts |= {"jerk": float(np.mean(jerks)) if jerks else None}
        passes = [record.passes for record in finished if record.passes is not None]
        counts |= {"passes": float(np.mean(passes)) if passes else None}
    return counts


def markdown(summary: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The report as text: what was run, a line for each axis where there are variations, a line for each task."""
    varied = any(row["variation"] for row in summary["rows"])
    header = [
        "task",
        *(["variation"] if varied else []),
        "success",
        "95% interval",
        "episodes",
        "steps",
        "latency",
        "jerk",
    ]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in summary["rows"]:
        cells = [row["task"], *([row["variation"] or "none"] if varied else [])]
        if "success" in row:
            steps = "" if row["steps_of_successes"] is None else f"{row['steps_of_successes']:.0f}"
            cells += [f"{row['success']:.0%}", f"{row['low']:.0%} to {row['high']:.0%}", f"{row['episodes']}", steps]
            jerk = "" if row["jerk"] is None else f"{row['jerk']:.3g}"
            cells += [f"{row['latency'] * 1000:.0f} ms", jerk]
        else:
            cells += ["", "", "0", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    mean = "no episode was finished" if summary["mean_success"] is None else f"{summary['mean_success']:.1%}"
    broken = f", {summary['errors']} more broke: given again, the command runs them again" if summary["errors"] else ""
    head = "\n".join(f"- {name}: `{value}`" for name, value in about.items())
    passes = [row["passes"] for row in summary["rows"] if row.get("passes") is not None]
    counted = f" A prediction took {np.mean(passes):.2f} passes of the language model." if passes else ""
    return (
        f"# Evaluation\n\n{head}\n\nMean success over rows: **{mean}** ({summary['episodes']} episodes{broken}). "
        "Steps are those of successes; latency is that of one batched prediction; jerk is the mean third difference of "
        f"the places that actions command, in their unit: the lower, the smoother.{counted}\n\n"
        + (f"Why environments broke:\n\n{reasons_list(summary['reasons'])}\n\n" if summary["errors"] else "")
        + (axes_table(summary["axes"]) + "\n\n" if varied else "")
        + "\n".join(lines)
        + "\n"
    )


def reasons_list(reasons: Mapping[str, int]) -> str:
    return "\n".join(f"- {count} times: {reason}" for reason, count in reasons.items())


def axes_table(axes: Sequence[Mapping[str, Any]]) -> str:
    """A line for each axis, all of its episodes together."""
    lines = ["| axis | success | 95% interval | successes | episodes | tasks |", f"|{' --- |' * 6}"]
    for row in axes:
        rate = ["", "", ""]
        if "success" in row:
            rate = [f"{row['success']:.0%}", f"{row['low']:.0%} to {row['high']:.0%}", f"{row['successes']}"]
        lines.append(f"| {' | '.join([row['axis'], *rate, str(row['episodes']), str(row['tasks'])])} |")
    text = "All episodes of an axis together, each once, tasks that have it only:\n\n" + "\n".join(lines)
    if any(row["axis"] == "language" for row in axes):
        text += "\n\nA success along `language` is the task that was asked, not the other one that the scene allows."
    return text


def plot_success(summary: Mapping[str, Any], path: Path) -> bool:
    """A bar for each task with its interval; where there are variations one for each axis, and below them a field for
    each task and variation. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in summary["rows"] if "success" in row]
    if not any(row["variation"] for row in rows):
        figure = Figure(figsize=(8, _height(rows)), layout="constrained")
        _bars(figure.subplots(), [row["task"] for row in rows], rows, "tab:blue")
    else:
        axes = [row for row in summary["axes"] if "success" in row]
        tasks = list({row["task"]: None for row in rows})
        order = [row["axis"] for row in axes]
        variations = sorted(
            {row["variation"] for row in rows}, key=lambda name: (order.index(name.partition(":")[0] or "none"), name)
        )
        heights = [_height(axes), 0.3 * len(tasks) + 1.9]
        figure = Figure(figsize=(max(8, 0.65 * len(variations) + 3), sum(heights)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=heights)
        _bars(above, [row["axis"] for row in axes], axes, "tab:orange")
        above.set(title="by axis, all episodes together", xlabel="")
        _fields(below, tasks, variations, rows)
    with whole_file(path) as part:
        figure.savefig(part, dpi=100, format="png")
    return True


def _height(rows: Sequence[Any]) -> float:
    """Inches: the longer the list, the closer its lines."""
    return (0.35 if len(rows) <= 20 else 0.22) * len(rows) + 0.9


def _fields(panel: Any, tasks: list[str], variations: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Success of each task (down) with each variation (across); empty where a task does not have it."""
    rates = np.full((len(tasks), len(variations)), np.nan)
    for row in rows:
        place = tasks.index(row["task"]), variations.index(row["variation"])
        rates[place] = row["success"]
        panel.text(*place[::-1], f"{row['success']:.0%}", ha="center", va="center", fontsize=8)
    panel.imshow(rates, cmap="Blues", vmin=0, vmax=1, alpha=0.7, aspect="auto")
    shown = [literal(name.replace(":", "\n")) or "none" for name in variations]
    panel.set_xticks(range(len(variations)), shown, fontsize=8)
    panel.set_yticks(range(len(tasks)), [*map(literal, tasks)])
    panel.set(title="success by task and variation")
    panel.tick_params(length=0)


def _bars(panel: Any, names: Sequence[str], rows: Sequence[Mapping[str, Any]], color: str) -> None:
    rates = np.array([row["success"] for row in rows])
    bounds = np.array([(row["low"], row["high"]) for row in rows]).reshape(-1, 2)
    panel.barh(
        [*map(literal, names)], rates, xerr=abs(bounds - rates[:, None]).T, color=color, ecolor="gray", capsize=2
    )
    panel.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xlabel="success")
    if len(names) > 20:
        panel.tick_params(axis="y", labelsize=7)


def write_report(folder: Path, records: Sequence[EpisodeResult], about: Mapping[str, Any]) -> dict[str, Any]:
    """report.json, report.md and report.png (with matplotlib) in `folder`."""
    summary = summarize(records)
    write_json(folder / "report.json", {"about": dict(about), **summary})
    drawn = plot_success(summary, folder / "report.png") if summary["mean_success"] is not None else False
    write_text(folder / "report.md", markdown(summary, about) + ("\n![success](report.png)\n" if drawn else ""))
    return summary


# Records on disk --------------------------------------------------------------------------------------------------


def append_result(file: Path, record: EpisodeResult) -> None:
    """One line more, on disk when this returns."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")
            stream.flush()
    except OSError as error:  # a full disk names no file
        error.filename = error.filename or str(file)
        raise


def read_results(file: Path) -> list[EpisodeResult]:
    """Records of a file; a line that a killed run left half written, or that was edited into something else, is
    dropped: its episode runs again."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = EpisodeResult(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        if _is_whole(record):
            records.append(record)
    return records


def _is_whole(record: EpisodeResult) -> bool:
    """Whether it holds what an episode writes: "false" would count as a success."""
    texts = (record.task, record.variation, record.instruction, record.error or "")
    counts = (record.episode, record.seed, record.steps, record.predictions)
    measured = [value for value in (record.latency, record.jerk, record.passes) if value is not None]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(count) is int and count >= 0 for count in counts)
        and isinstance(record.success, bool)
        and all(type(value) in (int, float) and 0 <= value < math.inf for value in measured)
    )

"""Numbers of a report, from records."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from openvla.evaluation.report import (
    EpisodeResult,
    append_result,
    read_results,
    summarize,
    wilson_interval,
    write_report,
)


def record(task="open", episode=0, success=True, **more) -> EpisodeResult:
    values = {"seed": 7, "instruction": "open it", "steps": 10, "predictions": 10, "latency": 0.02, **more}
    return EpisodeResult(task=task, episode=episode, success=success, **values)


@pytest.mark.parametrize(
    "successes, episodes, expected",
    [(8, 10, (0.4902, 0.9433)), (0, 20, (0.0, 0.1611)), (50, 50, (0.9287, 1.0))],  # tabulated values
)
def test_wilson_interval(successes, episodes, expected):
    assert wilson_interval(successes, episodes) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_errors():
    for successes, episodes in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="expected 0 to all"):
            wilson_interval(successes, episodes)


def test_every_task_counts_alike_and_broken_episodes_do_not():
    records = [record(episode=index, success=index < 8, steps=10 + index) for index in range(10)]
    records += [record(task="close", episode=index, success=False) for index in range(2)]
    records += [record(task="close", episode=2, success=False, error="ValueError: nan")]
    summary = summarize(records)
    assert summary["mean_success"] == pytest.approx((0.8 + 0.0) / 2)
    assert (summary["episodes"], summary["errors"]) == (12, 1)
    close, opened = summary["rows"]
    assert (close["task"], close["episodes"], close["errors"], close["steps_of_successes"]) == ("close", 2, 1, None)
    assert opened["steps_of_successes"] == pytest.approx(13.5)


def varied_records() -> list[EpisodeResult]:
    """Per axis: successes and episodes of two tasks, one of which does not have the axis "language"."""
    counts = {
        "": ((9, 10), (7, 10)),
        "language": ((3, 8), (0, 0)),
        "motion": ((1, 6), (2, 3)),
        "visual:light": ((4, 5), (0, 2)),
        "visual:camera": ((1, 5), (2, 2)),
    }
    return [
        record(task=task, episode=index, success=index < successes, variation=variation)
        for variation, tasks in counts.items()
        for task, (successes, episodes) in zip(("open", "close"), tasks)
        for index in range(episodes)
    ]


def test_an_axis_pools_all_of_its_episodes():
    records = [*varied_records(), record(task="close", episode=9, success=False, variation="motion", error="broken")]
    axes = {row["axis"]: row for row in summarize(records)["axes"]}
    assert list(axes) == ["none", "visual", "motion", "language"]  # the paper's order, whatever came first
    expected = {"none": (16, 20, 2), "visual": (7, 14, 2), "motion": (3, 9, 2), "language": (3, 8, 1)}
    for axis, (successes, episodes, tasks) in expected.items():
        row = axes[axis]
        assert (row["successes"], row["episodes"], row["tasks"]) == (successes, episodes, tasks)
        assert row["success"] == pytest.approx(successes / episodes)
        # Wilson by its other form: the roots of (p - rate)^2 = z^2 p (1 - p) / n
        z2 = 1.959964**2
        roots = sorted(np.roots([1 + z2 / episodes, -2 * row["success"] - z2 / episodes, row["success"] ** 2]))
        assert [row["low"], row["high"]] == pytest.approx(roots, abs=1e-6)
    assert axes["motion"]["errors"] == 1


def test_an_axis_counts_no_episode_twice():
    """One of an axis alone is that of the kind which it drew; two kinds of wording may draw the same words."""
    drawn = [record(episode=index, success=index < 4, variation="visual") for index in range(10)]
    light = [record(episode=index, success=False, variation="visual:light") for index in range(10)]
    other = [record(task="close", episode=index, variation="visual:light") for index in range(5)]
    words = [
        record(episode=index, success=index < 2, variation=f"semantic:{kind}", instruction=f"wording {index % several}")
        for kind, several in (("paraphrase", 2), ("unseen", 1))
        for index in range(4)
    ]
    words += [record(episode=9, success=False, variation="semantic:unseen", error="broken")]
    summary = summarize([*drawn, *light, *other, *words])
    axes = {row["axis"]: row for row in summary["axes"]}
    assert (axes["visual"]["successes"], axes["visual"]["episodes"], axes["visual"]["tasks"]) == (4 + 5, 10 + 5, 2)
    assert (axes["semantic"]["successes"], axes["semantic"]["episodes"]) == (2 + 1, 4 + 2)
    assert axes["semantic"]["errors"] == 1 and summary["episodes"] == 10 + 10 + 5 + 8  # rows are as they were run


def test_axes_are_shown_where_there_are_variations(tmp_path):
    write_report(tmp_path, varied_records(), {})
    text = (tmp_path / "report.md").read_text()
    assert "| visual | 50% | 27% to 73% | 7 | 14 | 2 |" in text and "the task that was asked, not the other" in text
    assert text.index("| axis |") < text.index("| task |")
    assert json.loads((tmp_path / "report.json").read_text())["axes"][0]["axis"] == "none"
    write_report(tmp_path, [entry for entry in varied_records() if not entry.variation], {})
    assert "| axis |" not in (tmp_path / "report.md").read_text()


def test_files_of_a_report(tmp_path):
    file = tmp_path / "episodes.jsonl"
    records = [record(episode=0), record(episode=1, success=False, variation="light")]
    for entry in records:
        append_result(file, entry)
    with file.open("a") as stream:
        stream.write('{"task": "half')  # of a run that was killed
    assert read_results(file) == records
    write_report(tmp_path, read_results(file), {"model": "mine"})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["mean_success"] == 0.5 and report["about"] == {"model": "mine"}
    text = (tmp_path / "report.md").read_text()
    assert "| open | light | 0% | 0% to 79% | 1 |" in text and "model: `mine`" in text
    assert summarize(read_results(file))["rows"] == report["rows"]


def test_a_report_of_nothing(tmp_path):
    write_report(tmp_path, [record(success=False, error="broken")], {})
    assert "no episode was finished" in (tmp_path / "report.md").read_text()


def test_records_that_were_edited_are_none(tmp_path):
    """Their episodes run again: what is read as a success without being one stands in a report."""
    good = asdict(record())
    wrong = [
        {"success": "false"},
        {"success": 1},
        {"steps": "9"},
        {"steps": -9},
        {"latency": float("nan")},
        {"task": ["close"]},
        {"seed": None},
    ]
    lines = [json.dumps({**good, **change}) for change in ({}, *wrong)] + ["3", "[1]", "null", json.dumps(good)[:30]]
    (tmp_path / "episodes.jsonl").write_text("\n".join(lines))
    assert read_results(tmp_path / "episodes.jsonl") == [record()]

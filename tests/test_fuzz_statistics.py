"""Hostile statistics: an action has the units that were written down, or there is an error that says why not."""

import copy
import json
import math
import random

import numpy as np
import pytest

from openvla.action_tokenizer import (
    LARGEST,
    check_statistics,
    get_action_stats,
    normalize_actions,
    read_statistics,
    unnormalize_actions,
)
from openvla.presets import load_preset_statistics


FIELDS = ("q01", "q99", "min", "max", "mean", "std", "mask")
HOSTILE = (
    None, True, False, 0, -1, 0.0, -0.0, 1e-300, 1e6, 1.1e6, -1e308, 1e308, 10**400, math.nan, math.inf, -math.inf, "",
    "0", "false", "NaN", [], [0.0], [[0.0]], {}, {"q01": [0.0]}, "\ud800",
)  # fmt: skip


def mutate(stats: dict, rng: random.Random) -> dict:
    """One to three changes anywhere in `{dataset: {"action": {...}}}`."""
    for _ in range(rng.randint(1, 3)):
        parent, key = stats, rng.choice(list(stats) or ["x"])
        while isinstance(parent.get(key), dict) and parent[key] and rng.random() < 0.8:
            parent, key = parent[key], rng.choice(list(parent[key]))
        value = parent.get(key)
        kind = rng.choice(("replace", "drop", "entry", "shorten", "lengthen", "swap", "scale", "rename", "scalar"))
        if kind == "drop":
            parent.pop(key, None)
        elif kind == "rename":
            parent[str(key).upper()] = parent.pop(key, None)
        elif kind == "swap" and {"q01", "q99"} <= parent.keys():
            parent["q01"], parent["q99"] = parent["q99"], parent["q01"]
        elif isinstance(value, list) and value and kind != "replace":
            position = rng.randrange(len(value))
            if kind == "shorten":
                del value[position]
            elif kind == "lengthen":
                value.insert(position, copy.deepcopy(rng.choice([*HOSTILE, value[position]])))
            elif kind == "scale" and isinstance(value[position], float):
                value[position] *= rng.choice((-1, 1e-9, 1e9, 10))
            elif kind == "scalar":
                parent[key] = value[position]
            else:
                value[position] = copy.deepcopy(rng.choice(HOSTILE))
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return stats


def is_sound(stats) -> bool:
    """What a person would accept, written a second time and in another way than the code under test."""
    if not isinstance(stats, dict) or not {"q01", "q99"} <= stats.keys():
        return False
    columns = {name: stats[name] for name in FIELDS if stats.get(name) is not None or name in stats and name != "mask"}
    if not all(isinstance(column, list) for column in columns.values()):
        return False
    if {len(column) for column in columns.values()} in ({0}, set()) or len({len(c) for c in columns.values()}) > 1:
        return False
    for dim in range(len(columns["q01"])):
        row = {name: column[dim] for name, column in columns.items()}
        if not isinstance(row.pop("mask", True), bool):
            return False
        if any(type(number) not in (int, float) or not -LARGEST <= number <= LARGEST for number in row.values()):
            return False
        if row["q01"] > row["q99"] or row.get("min", -math.inf) > row.get("max", math.inf) or row.get("std", 0) < 0:
            return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_statistics_are_right_or_refused(seed, tmp_path):
    rng, published = random.Random(seed), load_preset_statistics("openvla-7b")
    names = list(published)
    accepted = refused = 0
    for case in range(700):
        name = names[case % len(names)]
        content = mutate({name: copy.deepcopy(published[name])}, rng)
        if case % 7 == 0:  # through a file, where JSON can say it
            file = tmp_path / "dataset_statistics.json"
            file.write_text(json.dumps(content))
            check = lambda: read_statistics(file)  # noqa: B023, E731 - called at once
        else:
            check = lambda: check_statistics(content)  # noqa: B023, E731
        try:
            checked = check()
        except ValueError as error:
            refused += 1
            assert len(str(error)) > 20
            continue
        for key, entry in checked.items():
            assert is_sound(entry["action"]), (seed, case, entry)
            stats = get_action_stats(checked, key)
            actions = np.linspace(-1, 1, 5)[:, None].repeat(len(stats["q01"]), axis=1)
            found = unnormalize_actions(actions, stats)
            low, high = np.asarray(stats["q01"], float), np.asarray(stats["q99"], float)
            mask = np.asarray(stats.get("mask") or [True] * len(low))
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found[0], np.where(mask, low, -1), atol=1e-9)
            np.testing.assert_allclose(found[-1], np.where(mask, high, 1), atol=1e-9)
            assert np.isfinite(normalize_actions(found, stats)).all()
            accepted += 1
    assert accepted > 50 and refused > 300, "the mutations have lost their teeth"

"""Mixtures: how they are named, and the original's weighting rule."""

import json

import numpy as np
import pytest
from tiny import FIXTURES

from openvla.data.mixture import load_mixture, mixture_probabilities


CASES = json.loads((FIXTURES / "pipeline" / "interleave_cases.json").read_text())


@pytest.mark.parametrize(
    "case", [case for case in CASES if "error" not in case], ids=lambda case: str(case["sizes"])[:30]
)
def test_weighting_of_the_original(case):
    probabilities, length = mixture_probabilities(case["weights"], case["sizes"], case["balance"])
    np.testing.assert_allclose(probabilities, case["sample_weights"], rtol=1e-12)
    assert length == case["dataset_len"]


def test_without_a_weight_of_1_the_largest_counts():
    """The original raises an IndexError here."""
    probabilities, length = mixture_probabilities([0.5, 2.0], [100, 300])
    np.testing.assert_allclose(probabilities, [50 / 650, 600 / 650])
    assert length == int(300 / (600 / 650))


def test_named_written_and_from_a_file(tmp_path):
    assert load_mixture("oxe_magic_soup_plus")["bridge_orig"] == 1.0
    assert load_mixture("bridge_orig:1.0, fractal20220817_data:0.54") == {
        "bridge_orig": 1.0,
        "fractal20220817_data": 0.54,
    }
    assert load_mixture("a,b:2") == {"a": 1.0, "b": 2.0}
    (tmp_path / "mine.yaml").write_text("a: 1\nb: 0.25\n")
    assert load_mixture(tmp_path / "mine.yaml") == {"a": 1.0, "b": 0.25}


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("oxe_magic_soop", "Did you mean 'oxe_magic_soup"),
        ("a:1,a:2", "twice"),
        ("a:0,b:1", "above 0"),
        ("a:many", "expected a number"),
        ("a:nan", "above 0"),
    ],
)
def test_mistakes(specification, message):
    with pytest.raises(ValueError, match=message):
        load_mixture(specification)


def test_more_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        load_mixture(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="dataset: weight"):
        load_mixture(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="one for each"):
        mixture_probabilities([1.0], [1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 0.5\na: 3\n", "line 3: 'a' stands there twice, first in line 1"),
        ("a: {path: x, weight: 1, weight: 2}\n", "line 1: 'weight' stands there twice"),
        ("a: 1\n b: [\n", "mine.yaml' is no YAML: .*line 2"),
    ],
)
def test_a_file_that_says_two_things(tmp_path, content, message):
    """The library keeps the last of two equal keys, silently."""
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_mixture(tmp_path / "mine.yaml")


def test_merged_keys_are_not_given_twice(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: &usual {weight: 2, path: x}\nb: {<<: *usual, path: y}\n")
    assert load_mixture(tmp_path / "mine.yaml") == {"a": 2.0, "b": 2.0}

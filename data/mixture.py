"""Mixtures of datasets: who takes part, with which weight, and how often each is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..choices_openvla import closest
from .oxe.catalog import load_oxe_mixtures


def load_mixture(specification: str | Path) -> dict[str, float]:
    """`{dataset: weight}` of a mixture; see `load_entries`, whose errors it shares."""
    return {name: entry["weight"] for name, entry in load_entries(specification).items()}


def load_entries(specification: str | Path) -> dict[str, dict[str, Any]]:
    """`{dataset: {"weight": ..., further options}}` of a mixture.

    Args:
        specification: Name of an Open-X mixture (`"oxe_magic_soup_plus"`), or `"bridge_orig:1.0,kuka:0.5"` (a weight
            left out is 1), or a YAML file of `dataset: weight` or `dataset: {weight: 0.5, path: ..., ...}`.

    Raises:
        ValueError: If it is none of these, names a dataset twice, or has a weight that is not above 0.
    """
    text, named = str(specification), load_oxe_mixtures()
    if text in named:
        return {name: {"weight": weight} for name, weight in named[text].items()}
    if is_mixture_file(text):
        if not Path(text).is_file():
            raise FileNotFoundError(f"No mixture file at '{text}'.")
        loaded = _read_yaml(Path(text))
        if not isinstance(loaded, dict) or not loaded:
            raise ValueError(f"'{text}' holds no mixture: expected lines of 'dataset: weight'.")
        pairs: list[tuple[str, Any]] = [(str(name), weight) for name, weight in loaded.items()]
    elif "," in text or ":" in text:
        parts = [part.strip().partition(":") for part in text.split(",") if part.strip()]
        for name, colon, weight in parts:
            if not name.strip() or (colon and not weight.strip()):
                raise ValueError(f"'{name}{colon}{weight}' in '{text}' is no 'dataset:weight'.")
        pairs = [(name.strip(), weight or "1") for name, _, weight in parts]
    else:
        raise ValueError(
            f"'{text}' is no mixture.{closest(text, named)} Give a name ({', '.join(sorted(named))}), "
            "'dataset:weight,dataset:weight', or a YAML file."
        )
    mixture: dict[str, dict[str, Any]] = {}
    for name, entry in pairs:
        options = {str(key): value for key, value in entry.items()} if isinstance(entry, dict) else {"weight": entry}
        number = check_weight(options.get("weight", 1), f"The weight of '{name}' is {options.get('weight', 1)!r}")
        if name in mixture:
            raise ValueError(f"'{name}' stands in the mixture twice.")
        mixture[name] = {**options, "weight": number}
    return mixture


def _read_yaml(file: Path) -> Any:
    """The content of a YAML file. Raises a `ValueError` where it is no YAML, or a key stands twice in one place, of
    which the library would keep the last one alone."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[Any, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"'{file}', line {line}: '{key.value}' stands there twice, first in line {lines[key.value]}: "
                        "leave one out, or give each a name of its own."
                    )
                lines[key.value] = line
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no YAML: {' '.join(str(error).split())}") from error


def check_weight(weight: Any, what: str) -> float:
    """A finite number above 0. Raises a `ValueError` that begins with `what` for anything else."""
    try:
        number = float("nan" if isinstance(weight, bool) else weight)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected a number.") from error
    if not 0 < number < float("inf"):
        raise ValueError(f"{what}: it must be a number above 0; leave out what shall not be drawn.")
    return number


def is_mixture_file(specification: str | Path) -> bool:
    return str(specification).endswith((".yaml", ".yml"))


def mixture_probabilities(
    weights: Sequence[float] | None, sizes: Sequence[int], balance: bool = True
) -> tuple[np.ndarray, int]:
    """How likely each dataset is drawn, and how many frames make an epoch.

    Balanced, as OpenVLA trains: a dataset is drawn in proportion to weight times frames: weight 1 means its
    natural share. An epoch is long enough for every dataset of weight 1 to be seen once on average. Where none has
    weight 1, those of the largest weight take that part (the original raises an IndexError).

    Args:
        weights: (N,) above 0; None: all 1.
        sizes: (N,) frames of each dataset.
        balance: False: drawn in proportion to the weights alone.

    Returns:
        (N,) probabilities that sum to 1, and the length of an epoch.
    """
    sizes_array = np.asarray(sizes, dtype=np.float64)
    weights_array = np.ones_like(sizes_array) if weights is None else np.asarray(weights, dtype=np.float64)
    if sizes_array.shape != weights_array.shape or sizes_array.ndim != 1 or len(sizes_array) == 0:
        raise ValueError(f"{weights_array.size} weights for {sizes_array.size} datasets: give one for each.")
    if not all(((0 < array) & (array < np.inf)).all() for array in (weights_array, sizes_array)):
        raise ValueError(f"Weights {weights_array.tolist()} and sizes {sizes_array.tolist()} must be numbers above 0.")
    shares = weights_array * sizes_array if balance else weights_array
    probabilities = shares / shares.sum()
    primary = weights_array == (1.0 if (weights_array == 1.0).any() else weights_array.max())
    return probabilities, int((sizes_array / probabilities)[primary].max())

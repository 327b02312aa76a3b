"""Where quality is usually lost, before a run and after it: functions that return a list say what to warn of, those
that return None raise a `ValueError`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm

from ..action_spec import action_names
from ..cameras_openvla import is_on_arm, view_of
from ..configuration_openvla import OpenVLAConfig
from ..data.checks import check_data
from ..data.sources import Source
from ..parts_openvla import WEIGHTLESS_HEADS
from ..processing_openvla import OpenVLAProcessor


GOOD_L1 = 0.01  # normalized; half a bin is 0.004

__all__ = [
    "check_cameras",
    "check_chunk",
    "check_data",
    "check_head",
    "check_held_out",
    "check_images",
    "check_meaning",
    "check_relearned",
    "check_rates",
    "check_result",
    "check_same_statistics",
    "check_shared",
    "check_units_of_one_robot",
]


class DivergedError(ValueError):
    """The loss, the gradient or the weights of a run are not finite: it has stopped."""

    exit_code = 1  # of the command line


def check_same_statistics(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[str]:
    """Whether statistics that a model brings for a dataset are those of the data.

    Args:
        before, now: `"action"` entries. Both q01 and q99 may differ by a tenth of their distance.
        names: Of the dimensions.
    """
    if len(before["q01"]) != len(now["q01"]):
        return [f"{name}: the model's statistics have {len(before['q01'])} dimensions, the data {len(now['q01'])}."]
    bounds, bounds_now = ((each["q01"], each["q99"]) for each in (before, now))
    names = _moved(bounds, bounds_now, names or action_names(len(now["q01"])))
    if not names:
        return []
    return [
        f"{name}: the statistics of the model and those of the data differ in {', '.join(names)}. The run uses the "
        "data's; if the model learned this dataset before, was it another version, controller or unit?"
    ]


def _moved(before: Sequence[Any], now: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Dimensions of which what becomes -1 or 1, the two of `before` and `now`, differs by more than a tenth of their
    distance."""
    low, high = map(np.asarray, now)
    span = np.maximum(high - low, 1e-6)
    moved = np.maximum(abs(np.asarray(before[0]) - low), abs(np.asarray(before[1]) - high)) > 0.1 * span
    return [name for name, far in zip(names, moved) if far]


def check_units_of_one_robot(sources: Sequence[Source], sees_state: bool) -> list[str]:
    """Whether datasets of a mixture whose numbers have the same recorded names, as those of one robot have, are in
    different units, or in another order: the same motion, or state, is another number in each then, of which image and
    words tell a model nothing."""
    found, firsts = [], dict[tuple[str, ...], Source]()
    for source in sources:
        if source.recorded_names is None or source.standardize is not None:
            continue
        first = firsts.setdefault(tuple(source.recorded_names), source)
        if first is source:
            ordered = [other for names, other in firsts.items() if sorted(names) == sorted(source.recorded_names)]
            found += [
                f"{source.name} and {ordered[0].name} have the same dimensions in another order "
                f"({', '.join(source.recorded_names)}; {', '.join(ordered[0].recorded_names or ())}): each is learned "
                "as it is recorded. Choose the numbers in one order, with keys of single ones (action_key of an entry) "
                "or a reader of your own."
            ][: len(ordered) - 1]
        stats, others = source.statistics["action"], first.statistics["action"]
        masks = [each.get("mask") or [True] * source.action_dim for each in (others, stats)]
        moved = _moved(first.bounds(others), source.bounds(stats), source.names)
        moved = [
            name
            for name, *scaled in zip(source.names, *masks)
            if any(scaled) and (not all(scaled) or name in moved)  # what both leave as recorded is the same in both
        ]
        if sees_state and source.state_dim == first.state_dim != 0:
            before, now = (each.bounds(each.statistics["proprio"]) for each in (first, source))
            names = source.state_names or [str(dim) for dim in range(source.state_dim)]
            moved += [f"state {name}" for name in _moved(before, now, names)]
        if moved:
            found.append(
                f"{source.name} and {first.name} have the same dimensions and other units ({', '.join(moved)}): 1 in "
                "one is not 1 in the other. If they are of one robot, give both the same statistics "
                f"(statistics: {first.name} for {source.name}, in the YAML file of the mixture)."
            )
    return found


def check_rates(sources: Sequence[Source]) -> list[str]:
    """Whether datasets whose numbers have the same recorded names, or the same units, as those of one robot have, were
    recorded at other rates: the change of one step is another motion in each then, and so is a chunk."""
    found, firsts = [], dict[tuple[Any, ...], Source]()
    for source in sources:
        if source.hz is None:
            continue
        units = source.statistics["action"]
        kinds = [kind for kind in (tuple(source.recorded_names or ()), (*units["q01"], *units["q99"])) if kind]
        first = next((firsts[kind] for kind in kinds if kind in firsts), source)
        firsts = {**dict.fromkeys(kinds, first), **firsts}
        if first.hz is not None and abs(source.hz / first.hz - 1) > 0.01:
            found.append(
                f"{source.name} and {first.name} have the same dimensions, at {source.hz:g} and {first.hz:g} actions a "
                "second: if they are of one robot, a step is another motion in each, of which image and words tell a "
                "model nothing. Record, or resample, both at one rate."
            )
    return found


def check_shared(sources: Sequence[Source]) -> list[str]:
    """Datasets of a mixture that hold episodes of another one, as a folder and a file in it."""
    held = [(source, {*source.survey.contents}) for source in sources]
    return [
        f"{source.name}: {shared} of {len(contents)} episodes are in {other.name} as well: they count twice, and what "
        "one holds out the other may train on. Give each once, if it is not for its other pictures."
        for number, (source, contents) in enumerate(held)
        for other, known in held[:number]
        if (shared := len(contents & known))
    ]


def check_relearned(before: OpenVLAConfig, now: OpenVLAConfig, sources: Sequence[Source]) -> list[str]:
    """Where a model of chunks, of given steps, of units of min and max, or of grippers that are scaled is to learn
    others, as a recipe or a default has it."""
    found = []
    if before.action_chunk > 1 and now.action_chunk != before.action_chunk:
        found.append(
            f"the model predicts chunks of {before.action_chunk}, and learns "
            f"{f'chunks of {now.action_chunk}' if now.action_chunk > 1 else 'single actions'} now: "
            f"--chunk {before.action_chunk} keeps its own."
        )
    if before.prefix_training and not now.prefix_training:
        found.append(
            f"the model learned to continue {before.prefix_training} given steps (--chunking prefix), and learns that "
            f"no longer: --prefix-training {before.prefix_training} keeps it."
        )
    learned = {before.normalization.get(name, "bounds_q99") for name in before.norm_stats or {}}
    if learned == {"bounds"}:
        found += [
            f"{source.name}: of all that the model has learned -1 and 1 are min and max (bounds), and of this q01 and "
            "q99: --normalization bounds keeps its units."
            for source in sources
            if source.normalization != "bounds"
        ]
    for source in sources:
        actions = [stats["action"] for stats in (before.norm_stats or {}).values()]
        alike = [action for action in actions if len(action.get("q01", [])) == source.action_dim]
        mask = source.statistics["action"].get("mask") or [True] * source.action_dim
        kept = [name for name, scaled in zip(source.names, mask) if not scaled]
        if kept and alike and not source.mask_given and all(all(action.get("mask") or [True]) for action in alike):
            found.append(
                f"{source.name}: of all actions of {source.action_dim} numbers that the model has learned all are "
                f"scaled to [-1, 1], as OpenVLA-OFT does for ALOHA, and of this {', '.join(kept)} stay as recorded: "
                f"--mask {','.join('1' * source.action_dim)} (of --statistics: their mask) keeps its units."
            )
    return found


def check_meaning(sources: Sequence[Source]) -> list[str]:
    """Whether a number of an action is a place in one dataset of a mixture and a change in another, of which image and
    words tell a model nothing."""
    absolute = np.array([source.absolute for source in sources])
    differ = absolute.any(axis=0) & ~absolute.all(axis=0)
    if not differ.any():
        return []
    of_places = [source.name for source, places in zip(sources, absolute) if places[differ].any()]
    of_changes = [source.name for source, places in zip(sources, absolute) if not places[differ].all()]
    return [
        f"{', '.join(np.array(sources[0].names)[differ])}: places in {', '.join(of_places)}, changes in "
        f"{', '.join(of_changes)} (--absolute-dims), and one model learns both: are they the same motions?"
    ]


def check_held_out(source: Source) -> list[str]:
    """Whether the episodes held out, the last ones, are most of those of a few instructions, as of a recording that
    has one task after the other: of these little or nothing is trained on, and nothing else is evaluated."""
    train, held_out = len(source.dataset), len(source.held_out or ())
    if not held_out or [len(dataset) for dataset in source.everything] != [train + held_out]:  # a split of its own
        return []
    of_all, kept_back = Counter[int](), Counter[int]()
    for index, *texts in source.survey.told:
        of_all.update(texts)
        kept_back.update(texts if index >= train else ())
    expected = held_out / (train + held_out)
    lost = [
        text
        for text, count in sorted(kept_back.items())
        if count > 1 and count >= of_all[text] * max(0.5, min(2 * expected, 1))
    ]
    if not lost or 2 * sum(kept_back[text] for text in lost) < kept_back.total() or len(of_all) < 2:
        return []
    named = [f"{source.survey.instructions[text]!r:.60} ({kept_back[text]} of {of_all[text]})" for text in lost[:3]]
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return [
        f"{source.name}: the last {held_out} episodes are held out, and with them most of those of {', '.join(named)}"
        f"{more}: little or nothing of that is trained on. --held-out 0 trains on all; a split 'val' in the recording "
        "(LeRobot: meta/info.json, HDF5: mask/valid) says which ones to hold out."
    ]


def check_chunk(action_chunk: int, sources: Sequence[Source]) -> None:
    """Raise a `ValueError` where no episode is as long as a chunk: of its last steps, which are not recorded anywhere,
    nothing would be learned, and a robot would be sent what comes out of them nevertheless."""
    parts = [part for source in sources for episode in source.survey.parts for part in episode]
    longest = max(steps for steps, _ in parts)
    if longest < action_chunk and all(source.chunk_end == "repeat" for source in sources):
        raise ValueError(
            f"action_chunk={action_chunk}: the longest episode, or part with one instruction, has {longest} steps, so "
            f"that nothing would be learned of the steps after it: give {longest} at the most, or chunk_end='still', "
            "with which a model learns to stand there."
        )


def check_head(before: OpenVLAConfig, now: OpenVLAConfig) -> None:
    """Raise a `ValueError` where a model has a head with weights that is another, or for other actions, than it is to
    learn: it is added to a model (`add_parts`), and not taken out of it."""
    if before.action_head not in (*WEIGHTLESS_HEADS, now.action_head):
        raise ValueError(
            f"head='{now.action_head}': the model has action_head='{before.action_head}' with weights of its own, "
            f"which stays: give head='{before.action_head}', or begin with a model of {' or '.join(WEIGHTLESS_HEADS)}, "
            "such as the one that this was fine-tuned from."
        )
    if before.action_dim not in (None, now.action_dim):
        raise ValueError(
            f"The head of the model ('{now.action_head}') is for actions of {before.action_dim} numbers, those of the "
            f"data have {now.action_dim}: choose them with action_key (--action-key), or begin with a model without it."
        )


def check_images(processor: OpenVLAProcessor, config: OpenVLAConfig) -> list[str]:
    """Whether images are normalized and sized as the towers of the model were trained."""
    images = processor.image_processor
    found = []
    for tower, model_id in enumerate(config.timm_model_ids):
        trained = timm.get_pretrained_cfg(model_id)
        if trained is None or tower >= len(images.means):
            continue
        for what, given, expected in (
            ("mean", images.means[tower], trained.mean),
            ("std", images.stds[tower], trained.std),
        ):
            if not np.allclose(given, expected, atol=1e-3):
                found.append(
                    f"images are normalized with {what} {json.dumps(list(given))}, but {model_id} was trained with "
                    f"{json.dumps(list(expected))}: does the processor belong to this model?"
                )
        if images.input_sizes[tower][-1] != config.image_sizes[tower]:
            found.append(
                f"the processor makes images of {images.input_sizes[tower][-1]} px, {model_id} expects "
                f"{config.image_sizes[tower]} px."
            )
    return found


def check_cameras(name: str, camera: str | None, camera_names: Sequence[str], given: bool = True) -> list[str]:
    """Whether a view that the model calls the scene is one on the arm: nothing tells a robot or simulator of that.

    Args:
        camera: What was chosen for the view "primary", of the dataset `name`.
        given: It was asked for, and is not the only one in colour.
    """
    scene = next((view for view in camera_names if view_of(view) == "primary"), None)
    if camera is None or scene is None or not is_on_arm(camera):
        return []
    way_out = (
        "Give --cameras wrist instead of --camera."
        if given
        else "No other one is in colours, of 8 bits and three channels. Give --cameras wrist, or correct the other one."
    )
    return [
        f"{name}: the model learns from the camera '{camera}', on the arm, under the name of the scene ('{scene}'); "
        f"where it acts, that name is the camera that looks at the scene. {way_out}"
    ]


def check_result(metrics: Mapping[str, float], names: Sequence[str], adapter: bool = True) -> list[str]:
    """Whether the actions of the training data were learned: L1 of each dimension, normalized.

    Args:
        adapter: The run has one, whose rank may be too small.
    """
    poor = {
        name: metrics[f"l1_normalized/{name}"] for name in names if metrics.get(f"l1_normalized/{name}", 0) > GOOD_L1
    }
    if not poor:
        return []
    values = ", ".join(f"{name} {value:.3f}" for name, value in poor.items())
    rank = ", with a larger --rank" if adapter else ""
    return [
        f"the training actions are not learned yet: normalized L1 of {values} (above {GOOD_L1}). Policies are usually "
        f"good below it: train longer (--steps){rank} or with a higher --learning-rate."
    ]

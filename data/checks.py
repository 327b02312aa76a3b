"""Warnings about the actions of a dataset, where quality is usually lost."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .dataset import EpisodeDataset
from .dimensions import RARE
from .filters import moving


if TYPE_CHECKING:
    from .source import Source


LOOKED_AT = 50  # episodes whose gripper is looked at
CLIPPED = 0.1  # share of the steps; the data's own quantiles clip 0.02
NARROW = 0.05  # part of the range of the statistics that the data takes at least
FOLLOWED, NEAR = 10, 0.1  # episodes looked at; mean distance to the state that counts as following it, of the range
TURNS = (2 * math.pi, 360.0)  # what an angle that is a place jumps by
SAME, NEARLY_ALL = 1e-5, 0.95  # distance of numbers that are one and the same, of the range; share of the steps
PAUSES = 0.1  # share of the steps in which nothing moves
SLOW = 1e-2  # of the largest motion: a step that `moving` takes for a pause may be a hundredth of it
CREEP = 0.02  # part of a range that is as good as standing, five bins
GRIPPER_DIMS = "--gripper-dims"


def check_data(source: "Source") -> list[str]:
    """What looks wrong with the actions of a dataset."""
    action, name, names = source.statistics["action"], source.name, source.names
    own, bounds = source.survey.statistics["action"], source.normalization == "bounds"
    found = check_still(source)
    found += check_rare(source) + check_grippers(source) + check_clipped(source) + check_places(source)
    some = _some_actions(source)
    found += check_turns(source, some) + check_last(source, some) + check_standstill(source) + check_copies(source)
    found += check_pauses(source, some)
    parts = [(names, own, action)]
    proprio = source.statistics.get("proprio")
    if bounds and source.survey.proprio and proprio:  # of states quantiles clip outliers, and all else is kept
        known, dims = source.state_names or [], len(proprio["q01"])
        labels = known if len(known) == dims else [f"state[{dim}]" for dim in range(dims)]
        parts.append((labels, source.survey.statistics["proprio"], proprio))
    wide = [
        f"{label} ({max(abs(least), abs(most)) / max(abs(q01), abs(q99), 1e-9):.0f} times q01 or q99)"
        for labels, seen, given in parts
        for label, least, most, q01, q99 in zip(labels, seen["min"], seen["max"], given["q01"], given["q99"])
        if max(abs(least), abs(most)) > 20 * max(abs(q01), abs(q99), 1e-6) and q01 < q99
    ]
    if wide:
        fate = (
            "min and max, which become -1 and 1, leave little for all else"
            if bounds
            else "they are clipped in training"
        )
        found.append(f"{name}: outliers in {', '.join(wide)}; {fate}. Are they real?")
    return found


def check_still(source: "Source") -> list[str]:
    """Dimensions that never change, with what the model will give for them."""
    action, own = source.statistics["action"], source.survey.statistics["action"]
    mask = action.get("mask") or [True] * source.action_dim
    least, most = (action.get(name) or [None] * source.action_dim for name in ("min", "max"))
    still, zero = [], []
    for dim, (label, low, high) in enumerate(zip(source.names, own["min"], own["max"])):
        # `normalize_actions` makes 0 of what never changes; only of what is scaled its value is found again.
        lost = not mask[dim] and least[dim] is not None and least[dim] == most[dim]
        if lost and (low or high):
            zero.append(f"{label} ({f'always {low:.3g}' if low == high else f'{low:.3g} to {high:.3g}'})")
        elif low == high:
            still.append(label)
    found = []
    if still:
        found.append(
            f"{source.name}: {', '.join(still)} never change{'s' if len(still) == 1 else ''}; the model will always "
            "give the one value it has seen."
        )
    if zero:
        found.append(
            f"{source.name}: {', '.join(zero)} never changes by the statistics and is not scaled (mask): training "
            "makes 0 of it, and the model will always give 0. Let it be scaled (1 in --mask), or leave --mask, "
            "--statistics or the standardization out that say otherwise."
        )
    return found


def check_places(source: "Source") -> list[str]:
    """Dimensions that are taken for changes and follow the state, as positions of joints do: where a robot waits, a
    change is 0, and that of a place is a motion."""
    picked = np.unique(np.linspace(0, len(source.dataset) - 1, FOLLOWED).astype(int))
    seen = [episode for episode in source.dataset.read(picked) if episode.state is not None]
    if not seen:
        return []
    actions, states = (np.concatenate([getattr(episode, what) for episode in seen]) for what in ("actions", "state"))
    if here := _here(source, actions, states, [len(episode) for episode in seen]):
        return here
    if source.absolute_dims is not None or states.shape[1] != source.action_dim:
        return []
    apart, range_ = abs(actions - states).mean(0), np.ptp(actions, axis=0)
    alike = (apart < NEAR * range_) & (abs(actions).mean(0) > NEAR * range_)
    relative = [dim for dim in range(source.action_dim) if not source.absolute[dim]]
    places = [dim for dim in relative if alike[dim]]
    if 2 * len(places) <= len(relative):
        return []
    listed = "all" if len(places) == len(relative) else ",".join(map(str, places))
    return [
        f"{source.name}: {', '.join(source.names[dim] for dim in places)} follow the state, as places do, and are "
        "taken for changes: a robot that waits would be told 0, which is a motion then. Are they places? "
        f"--absolute-dims {listed}, or none."
    ]


def _some_actions(source: "Source") -> list[np.ndarray]:
    """(T, A) float64 of a few episodes."""
    dataset = source.everything[0]  # without images
    picked = np.unique(np.linspace(0, len(dataset) - 1, FOLLOWED).astype(int))
    return [episode.actions.astype(np.float64) for episode in dataset.read(picked)]


def check_last(source: "Source", parts: Sequence[np.ndarray]) -> list[str]:
    """Episodes (T, A) whose last action is zero, as of a step that has none (RLDS), where actions are places: zero is
    far away from the one before, and in some dimension no place of any other step."""
    arm = [dim for dim in range(source.action_dim) if dim not in source.grippers]
    long = [part[:, arm] for part in parts if len(part) > 2]
    if len(long) < 2 or not arm:
        return []
    before = np.concatenate([part[:-1] for part in long])
    still = (before == 0).all(axis=1)
    beyond = (before[~still] > 0).all(axis=0) | (before[~still] < 0).all(axis=0)  # a change of 0 is one of many
    zero = [not part[-1].any() for part in long]
    moves = np.median(np.concatenate([np.linalg.norm(np.diff(part[:-1], axis=0), axis=1) for part in long]))
    jumps = np.median([np.linalg.norm(part[-1] - part[-2]) for part in long])
    if np.mean(zero) < 0.8 or still.mean() > 0.05 or jumps < 5 * moves or not beyond.any():
        return []
    return [
        f"{source.name}: the last action of {sum(zero)} of {len(zero)} episodes looked at is zero, far from the one "
        "before: of a step that has none, and learned like all else. --filters zero-actions leaves such steps out."
    ]


def check_pauses(source: "Source", parts: Sequence[np.ndarray]) -> list[str]:
    """Steps of episodes (T, A) in which nothing moves, as the filter `no-ops` finds them: a robot that waits sees the
    same image again, and where a model answers it with no motion, it does so for ever."""
    arm = [dim for dim in range(source.action_dim) if dim not in source.grippers]
    if not arm or source.absolute[arm].any():
        return []
    if max((abs(part[:, arm]).max(initial=0) for part in parts), default=0) < SLOW:
        return []  # in small units, or of many steps in a second, that is a motion
    moves = np.concatenate([moving(part[:, arm], part[:, list(source.grippers)]) for part in parts])
    if (share := 1 - moves.mean()) < PAUSES:
        return []
    return [
        f"{source.name}: nothing moves in {share:.0%} of the {len(moves)} steps looked at, and a robot that does as it "
        "was shown stops there, for ever. --filters no-ops leaves such steps out."
    ]


def check_turns(source: "Source", parts: Sequence[np.ndarray]) -> list[str]:
    """Angles that are places and go over the end of their range, in episodes (T, A): numbers on both sides of it mean
    nearly the same, and those between them, which are their mean, the opposite."""
    steps = np.concatenate([abs(np.diff(part, axis=0)) for part in parts]) if parts else np.empty((0, 0))
    if not len(steps):
        return []
    jumps = np.zeros(source.action_dim, dtype=int)
    range_ = np.ptp(np.concatenate(parts), axis=0)
    for turn in TURNS:
        jumps += ((steps > 0.9 * turn) & (steps < 1.1 * turn)).sum(axis=0) * (range_ < 1.1 * turn)
    jumps[list(source.grippers)] = 0  # a hand of 6 cm opens within a step
    turning = [f"{name} ({count} times in {len(steps)} steps)" for name, count in zip(source.names, jumps) if count]
    return [
        f"{source.name}: {', '.join(turning)} jumps by a full turn, as an angle at the end of its range does: a model "
        "that averages gives the angle opposite. Record changes, or angles counted from another zero or without end."
    ] * bool(turning)


def check_copies(source: "Source") -> list[str]:
    """Episodes that are there twice, as of a file that was copied within the folder."""
    firsts: dict[str, int] = {}
    contents, indices = source.survey.contents, [index for index, *_ in source.survey.told]  # each split has its own 0
    places = [(here, firsts.setdefault(content, here)) for here, content in enumerate(contents)]
    copies = [(indices[here], indices[first]) for here, first in places if here != first]
    if not copies:
        return []
    copy, first = copies[0]
    return [
        f"{source.name}: {len(copies)} of {len(contents)} episodes have the actions, states and words of another one "
        f"(episode {copy} those of {first}, counted from 0). If they are copies, leave them out: they count twice, and "
        "what is held out may be trained on."
    ]


def check_standstill(source: "Source") -> list[str]:
    """Changes of which none stands for no motion, where a chunk is to end with that."""
    if source.chunk_end != "still" or source.action_chunk == 1:
        return []
    first, last = source.bounds(source.statistics["action"])
    scaled = np.array(source.statistics["action"].get("mask") or [True] * source.action_dim)
    creep = CREEP * (last - first)
    moving = scaled & ~source.absolute & ((first > creep) | (last < -creep))
    named = [f"{source.names[dim]} ({first[dim]:.3g} to {last[dim]:.3g})" for dim in np.flatnonzero(moving)]
    return [
        f"{source.name}: {', '.join(named)}: no motion (0) is not among what actions are scaled from, and becomes the "
        "nearest of these: with chunk_end='still' (--chunk-end still) a model learns to move there for ever. Are they "
        "places (--absolute-dims)? Else repeat."
    ] * bool(named)


def _here(source: "Source", actions: np.ndarray, states: np.ndarray, lengths: Sequence[int]) -> list[str]:
    """Actions (N, A) that are numbers of the state (N, S) of the same step, as where the action was made of the state
    and not shifted by a step; of episodes of `lengths` steps. Where a robot waits, every place is that of now: it is
    looked at where the state changes with the next step."""
    range_ = np.ptp(actions, axis=0)
    moving = np.flatnonzero(range_ > 0)
    steps = np.abs(np.diff(states, axis=0, append=states[-1:]))
    steps[np.cumsum(lengths) - 1] = 0  # the last of each
    same = []
    for dim in moving:
        goes = steps > SAME * range_[dim]
        here = goes & (abs(actions[:, [dim]] - states) <= SAME * range_[dim])
        if ((here.sum(axis=0) >= NEARLY_ALL * goes.sum(axis=0)) & goes.any(axis=0)).any():
            same.append(dim)
    if len(same) < 2 or 2 * len(same) <= len(moving):
        return []
    return [
        f"{source.name}: {', '.join(source.names[dim] for dim in same)} of an action are numbers of the state of the "
        "same step: the model learns to stay where the robot is, and copies its answer where it sees the state. "
        "Places to go to are those of a later step, or what was commanded: is action_key (--action-key) right?"
    ]


def check_rare(source: "Source") -> list[str]:
    """Dimensions that nearly always have one value, with what becomes of the others."""
    action, own = source.statistics["action"], source.survey.statistics["action"]
    mask = action.get("mask") or [True] * source.action_dim
    first, last = source.bounds(action)
    kept, lost = [], []
    for dim, name in enumerate(source.names):
        low, high, share = own["min"][dim], own["max"][dim], source.survey.action["changed"][dim]
        if low == high or share > 2 * RARE:
            continue
        text = f"{name} ({share:.2%} of the steps, {low:.3g} to {high:.3g})"
        if mask[dim] and first[dim] == last[dim]:
            lost.append(text)
        elif not mask[dim] or (first[dim] <= low and high <= last[dim]):
            kept.append(text)
    found = []
    if kept:
        found.append(
            f"{source.name}: hardly ever changes: {', '.join(kept)}. The rare values are kept, but there is little to "
            "learn them from: is the recording complete?"
        )
    if lost:
        way_out = "--standardize none scales by" if source.standardize else "leave --statistics out to scale by"
        found.append(
            f"{source.name}: hardly ever changes: {', '.join(lost)}. q01 equals q99 there, so the model will always "
            f"give that one value; {way_out} the range of the data."
        )
    return found


def sure_grippers(source: "Source") -> list[int]:
    """Dimensions that are grippers: called so, the last of seven, or mostly in one of two states."""
    named = any("grip" in name.lower() for name in source.recorded_names or ())
    certain = source.gripper_dims is not None or named or source.action_dim == 7
    return [dim for dim in source.grippers if certain or source.survey.action["at_ends"][dim] >= 0.5]


def odd_grippers(source: "Source") -> list[tuple[int, float, float]]:
    """(dimension, min, max) of grippers whose values are not those of OpenVLA: 1 open, 0 closed."""
    own = source.survey.statistics["action"]
    ranges = [(dim, own["min"][dim], own["max"][dim]) for dim in sure_grippers(source)]
    return [(dim, low, high) for dim, low, high in ranges if low != high and (low < -0.01 or high > 1.01 or high < 0.5)]


def check_grippers(source: "Source") -> list[str]:
    """Grippers of another range than OpenVLA's, or that begin closed."""
    own, found = source.survey.statistics["action"], []
    odd = odd_grippers(source)
    for dim, low, high in odd:
        if low < -0.01 and high <= 1.5:
            advice = "say what the recording means with --gripper"
        else:
            advice = "it is scaled like the other dimensions, and the model will give it as recorded"
        found.append(
            f"{source.name}: {_gripper(source, dim)} lies in {low:.3g} to {high:.3g}, OpenVLA's convention is 1 open, "
            f"0 closed: {advice}. If it is no gripper: {GRIPPER_DIMS} none."
        )
    mask = source.statistics["action"].get("mask") or [True] * source.action_dim
    sure, known = sure_grippers(source), source.gripper_dims is not None or source.standardize is not None
    for dim in set(source.grippers) - {dim for dim, _, _ in odd}:
        low, high = own["min"][dim], own["max"][dim]
        if low != high and mask[dim] and source.mask_given:
            if dim in sure:
                found.append(
                    f"{source.name}: the mask given scales {_gripper(source, dim)} ({low:.3g} to {high:.3g}) like the "
                    "other dimensions; the published models leave it as it is recorded (0 in the mask)."
                )
        elif low != high and mask[dim] and not known:
            found.append(
                f"{source.name}: {source.names[dim]} ({low:.3g} to {high:.3g}) is scaled like the other dimensions, as "
                f"it does not look like a gripper of 1 open, 0 closed. Is it one? {GRIPPER_DIMS} {dim}, or none."
            )
        elif low != high and dim in sure and begins_closed(source.dataset, (low + high) / 2, dim):
            found.append(
                f"{source.name}: {_gripper(source, dim)} is near {low:.3g} (closed) when episodes begin, and arms "
                "mostly begin open: is the convention inverted? OpenVLA's is 1 open, 0 closed; --gripper open-is-0 "
                f"inverts. If it is no gripper: {GRIPPER_DIMS} none."
            )
    return found


def check_converted(source: "Source", gripper: str) -> list[str]:
    """Grippers that do not fit the convention given for them (`gripper`), and others to which it was not applied."""
    own, found = source.survey.statistics["action"], []
    for dim in source.grippers:
        low, high = own["min"][dim], own["max"][dim]
        if 0.1 < high < 0.9 or 0.1 < low < 0.9:  # neither closed nor open at one of its ends
            found.append(
                f"{source.name}: read as '{gripper}', {_gripper(source, dim)} goes from {low:.3g} to {high:.3g}, where "
                "0 is closed and 1 open: was it recorded in another convention?"
            )
    if source.gripper_dims is None:
        ends, changed = source.survey.action["at_ends"], source.survey.action["changed"]
        alike = [dim for dim in range(source.action_dim) if ends[dim] > 0.95 and changed[dim] > 2 * RARE]
        others = [source.names[dim] for dim in alike if dim not in source.grippers]
        if others:
            listed = ",".join(map(str, sorted({*source.grippers, *alike})))
            found.append(
                f"{source.name}: {', '.join(others)} looks like a gripper as well, and '{gripper}' was not applied to "
                f"it. Is it one? {GRIPPER_DIMS} {listed}, or {','.join(map(str, source.grippers))}."
            )
    return found


def _gripper(source: "Source", dim: int) -> str:
    return "the gripper" if source.names[dim] == "gripper" else f"the gripper ({source.names[dim]})"


def begins_closed(dataset: EpisodeDataset, middle: float, dim: int = -1) -> bool:
    """Whether the gripper is below `middle` in the first tenth of four episodes in five."""
    picked = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int))
    starts = [float(np.median(episode.actions[: max(1, len(episode) // 10), dim])) for episode in dataset.read(picked)]
    return bool(starts and np.mean(np.asarray(starts) < middle) > 0.8)


def check_clipped(source: "Source") -> list[str]:
    """Statistics, given or of a standardization, that are not those of the data: values beyond them in more than a
    tenth of the steps, or within a small part of them."""
    found = []
    for part, names in (("action", source.names), ("proprio", source.state_names)):
        stats, own = source.statistics.get(part) or {}, source.survey.statistics[part]
        clipped = getattr(source.survey, part).get("clipped", [])
        others = bool(stats) and (stats.get("q01"), stats.get("q99")) != (own["q01"], own["q99"])
        if not others:  # its own quantiles are exceeded by a few steps, many of a short dataset
            mask = stats.get("mask") or [True] * len(clipped)
            clipped = [0.0 if scaled else share for scaled, share in zip(mask, clipped)]
        names = names if names and len(names) == len(clipped) else [f"state[{dim}]" for dim in range(len(clipped))]
        far = [f"{name} ({share:.0%} of the steps)" for name, share in zip(names, clipped) if share > CLIPPED]
        if far:
            found.append(
                f"{source.name}: the {part} statistics do not fit the data: {', '.join(far)} beyond what they cover, "
                "and clipped. Are they of another dataset, controller or unit?"
            )
        elif clipped and others:
            narrow = [name for name, used in zip(names, _used(source, stats, own)) if used < NARROW]
            if narrow:
                found.append(
                    f"{source.name}: the data takes less than {NARROW:.0%} of the range of the {part} statistics in "
                    f"{', '.join(narrow)}: few values can be told apart. Are they of another dataset or unit?"
                )
    return found


def _used(source: "Source", stats: dict[str, Sequence[float]], own: dict[str, Sequence[float]]) -> list[float]:
    """What part of its scale the data takes; 1 where nothing is scaled or nothing moves."""
    mask = stats.get("mask") or [True] * len(stats["q01"])
    return [
        (high - low) / (last - first) if scaled and last > first and high > low else 1.0
        for first, last, low, high, scaled in zip(*source.bounds(stats), own["min"], own["max"], mask)
    ]

"""Whether faster ways to the tokens of an action give those of plain decoding, and what each of them takes."""

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ..decoding_openvla import EagerSteps
from ..device import synchronize
from ..graphs_openvla import plain_decoding, without_graphs
from ..inputs_openvla import ModelInputs, check_prompts, place_patches, read_state
from ..options.benchmark import BenchOptions
from .clock import QUANTILES, described, headline, quantiles
from .subject import frames_of, open_subject, prepare


LEGEND = "actions, tokens: share equal to those of plain; gap: of the logits, where not; ratio: times as fast as plain"
HEAD = "way                  actions  tokens  gap      passes  min ms   p50      p90      p99      ratio"
NEAR = 1e-4  # two logits that float32 may order either way
MEANS = {"plain": plain_decoding, "own": without_graphs, "drafts": without_graphs}  # of others what is prepared


def exact(options: BenchOptions) -> dict[str, Any]:
    """Predict frames of demonstrations in every way, one after the other for each frame.

    plain: The library's own steps, one token a pass. own: as `predict_action` does it without a draft, and without
    graphs. drafts: with the tokens of the frame before, within an episode. graphs, graphs and drafts: after
    `prepare_for_inference`, on a GPU.

    Returns:
        For each way the share of frames with the actions and tokens of plain decoding, the frames where the first other
        token had a logit as near as `NEAR`, the largest gap between the logits of the first other tokens in plain
        decoding, passes of the language model, and milliseconds of `predict_action` from processed inputs.

    Raises:
        ValueError: If there is no frame, or the head chooses no tokens one after the other.
    """
    if options.dataset is None or options.preset is not None:
        raise ValueError(
            "exact compares actions of a trained model on demonstrations: give --dataset, and no --preset."
        )
    model, key = open_subject(options)
    if not model.action_head.takes_drafts:
        raise ValueError(f"action_head='{model.config.action_head}' chooses no tokens one after the other.")
    prompt, processor = model.processor.format_prompt, model.processor
    found = frames_of(options, model, key, options.frames)
    frames = [
        (
            frame.begins,
            dict(processor(prompt(frame.instruction), frame.images, state=frame.state, return_tensors="pt")),
        )
        for frame in found
    ]
    prepared = prepare(options, model, key, found)
    results = compare(model, frames, key, graphs=bool(prepared.get("graphs")))
    report = {
        **described(options, model),
        "frames": len(frames),
        **prepared,
        "ways": results,
    }
    return report


def compare(model: Any, frames: list, key: str, graphs: bool) -> dict[str, dict[str, Any]]:
    """{way: figures}, see `exact`."""
    names = ["plain", "own", "drafts", *(["graphs", "graphs and drafts"] if graphs else [])]
    last: dict[str, Any] = {}
    counts: dict[str, dict[str, list]] = {name: {"ms": [], "passes": [], "equal": [], "gaps": []} for name in names}
    for number, (begins, inputs) in enumerate(frames):
        found = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            options = {"unnorm_key": key, "draft": None if begins or "drafts" not in name else last.get(name)}
            with MEANS.get(name, nullcontext)():
                found[name], milliseconds = timed(model, inputs, options)
            last[name] = found[name].token_ids
            counts[name]["ms"].append(milliseconds)
            counts[name]["passes"].append(int(found[name].token_passes.max()))
        expected = found["plain"].token_ids.reshape(-1)
        for name in names:
            same = found[name].token_ids.reshape(-1) == expected
            counts[name]["equal"].append(same)
            if not same.all():
                other = found[name].token_ids.reshape(-1)[same.argmin()]
                counts[name]["gaps"].append(gap(model, inputs, expected[: same.argmin() + 1], int(other), key))
    return {name: figures(values, counts["plain"]["ms"]) for name, values in counts.items()}


def timed(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> tuple[Any, float]:
    """A prediction, and the milliseconds that it took."""
    synchronize(model.device)
    started = time.perf_counter()
    found = model.predict_action(**inputs, **options, return_dict=True)
    synchronize(model.device)
    return found, 1000 * (time.perf_counter() - started)


@torch.inference_mode()
def gap(model: Any, inputs: dict[str, Any], tokens: np.ndarray, other: int, key: str) -> float:
    """By how much plain decoding prefers the last of `tokens` to `other`, in logits.

    Args:
        inputs: Of `predict_action`, one sample.
        key: Dataset of its state, of a model that sees it.
    """
    prompts = check_prompts(inputs["input_ids"], inputs["attention_mask"], model.config, model.num_patches)
    mode = model.normalization.get(key, "bounds_q99")
    state = read_state(inputs.get("state"), model.config, model.norm_stats, [key], [mode], model.constant_state)
    given = ModelInputs(prompts, inputs["pixel_values"], state)
    prefix = model.prefix(given, place_patches(given.prompts, model.config, model.num_patches, len(tokens)))
    steps = EagerSteps(model.language_model, prefix, len(tokens), (0, None))
    logits = steps.prefill()
    for number, token in enumerate(tokens[:-1].tolist()):
        logits = steps.step(torch.tensor([[token]], device=logits.device), number)
    return float(logits[0, -1, int(tokens[-1])] - logits[0, -1, other])


def figures(values: dict[str, list], plain: list[float]) -> dict[str, Any]:
    equal = np.stack(values["equal"])
    kept, before = (np.array(times[min(5, len(times) - 1) :]) for times in (values["ms"], plain))  # first ones warm up
    return {
        "identical_actions": float(equal.all(axis=1).mean()),
        "identical_tokens": float(np.cumprod(equal, axis=1).mean()),  # up to the first difference
        "differences": len(values["gaps"]),
        "differences_of_equal_logits": sum(abs(value) < NEAR for value in values["gaps"]),
        "largest_gap": max(values["gaps"], default=0.0),
        "passes": float(np.mean(values["passes"])),
        **quantiles(kept),
        "times_as_fast": float(before.min() / kept.min()),
    }


def table(report: dict[str, Any]) -> str:
    """The figures of each way on a line."""
    lines = [headline(report), LEGEND, HEAD]
    for name, row in report["ways"].items():
        times = " ".join(f"{row[part]:8.2f}" for part in QUANTILES)
        lines.append(
            f"{name:<20} {row['identical_actions']:7.1%} {row['identical_tokens']:7.1%}  {row['largest_gap']:.1e} "
            f"{row['passes']:6.2f} {times} {row['times_as_fast']:6.2f}"
        )
    return "\n".join(lines)

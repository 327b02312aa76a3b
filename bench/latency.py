"""How long one action takes, by stage, against what the hardware allows and against other ways to it."""

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from ..action_tokenizer import normalize_actions
from ..graphs_openvla import plain_decoding, without_graphs
from ..options.benchmark import BenchOptions
from ..stages_openvla import stage
from .clock import QUANTILES, WARM_UP, described, headline, quantiles, staged, timed
from .exact import NEAR, gap
from .other import Other, open_onnx
from .roofline import count_work, limit_ms, machine_rates
from .subject import Frame, PresetInputs, frames_of, open_subject, prepare


class Local:
    """`predict_action` from raw images, of the model in this process.

    Args:
        drafts: "": none. "last": what was predicted for the frame before. "right": what will be predicted.
    """

    def __init__(self, options: BenchOptions, model: Any, key: str, plain: bool = False, drafts: str = ""):
        self.model, self.key, self.plain, self.drafts = model, key, plain, drafts
        self.preset = PresetInputs(options.preset, model) if options.preset else None
        self.last: np.ndarray | None = None
        self.found: Any = None

    def prepare(self, frame: Frame) -> None:
        """What is known before the clock runs."""
        if frame.begins:
            self.last = None
        if self.drafts == "right":
            self(frame)

    def close(self) -> None:
        """Nothing is open."""

    def __call__(self, frame: Frame) -> np.ndarray:
        more: dict[str, Any] = {"draft": self.last} if self.drafts else {}
        if frame.state is not None:
            more["state"] = frame.state
        if self.preset is None:
            more |= {"image": frame.images, "instruction": frame.instruction}
        else:
            with stage("preprocessing"):
                more |= self.preset([frame])
        with plain_decoding() if self.plain else nullcontext():
            self.found = self.model.predict_action(**more, unnorm_key=self.key, return_dict=True)
        self.last = self.found.token_ids
        return self.found.actions


def ways_of(options: BenchOptions, model: Any, key: str) -> dict[str, Any]:
    """{name: way}: of this process, an export, other environments."""
    ways: dict[str, Any] = {"predict_action": Local(options, model, key)}
    if model.action_head.takes_drafts:
        ways["plain decoding"] = Local(options, model, key, plain=True)
        if options.dataset is not None:
            ways["drafts"] = Local(options, model, key, drafts="last")
        ways["right drafts"] = Local(options, model, key, drafts="right")
    if options.onnx is not None:
        ways["onnx"] = open_onnx(options, key)
    if options.against:
        check_asked_of_others(options, model)
    # As the model is here: what an environment takes by default (torch, transformers) may be another device or type.
    dtype: Any = str(model.dtype).removeprefix("torch.")
    same = replace(options, device=str(model.device), dtype=dtype)
    for name, python in options.against.items():
        ways[name] = Other(str(python), same, key)
    return ways


def check_asked_of_others(options: BenchOptions, model: Any) -> None:
    """Raise a `ValueError` for a model that other environments are not asked for: they are sent one image and no state.
    Say what is not the same there."""
    seen = f"{len(model.camera_names)} cameras" if len(model.camera_names) > 1 else ""
    seen += " and the state" if seen and model.config.proprio_dim else "the state" if model.config.proprio_dim else ""
    if seen:
        raise ValueError(f"--against sends one image and no state, and this model sees {seen}: leave it out.")
    if options.quantization is not None:
        warnings.warn(
            f"quantization='{options.quantization}' is of the model here alone: {', '.join(options.against)} predict "
            "with weights as the folder has them.",
            stacklevel=2,
        )


def check_actions(name: str, actions: np.ndarray, expected: np.ndarray) -> None:
    """Raise a `ValueError` where a way gives no actions of this model."""
    if actions.shape != expected.shape or not np.isfinite(actions).all():
        wrong = f"actions of shape {actions.shape}" if np.isfinite(actions).all() else "NaN or infinity"
        raise ValueError(f"'{name}' gives {wrong}, and the model here {expected.shape}: it measures something else.")


def latency(options: BenchOptions) -> dict[str, Any]:
    """Predict every frame in every way, in turns, from raw images to actions.

    Returns:
        The machine's rates, and for each way: quantiles of the total; of those in this process the quantiles of every
        stage, from each second frame, and their limit; passes of the language model; the share of frames whose actions
        are those of `predict_action`, and of each that differs its number and gap (see `token_gap`).
    """
    model, key = open_subject(options)
    frames = frames_of(options, model, key, options.frames + WARM_UP)
    if len(frames) <= WARM_UP:
        raise ValueError(
            f"'{options.dataset}' holds {len(frames)} frame(s), and {WARM_UP} are not counted: give a dataset of more."
        )
    prepared = prepare(options, model, key, frames)
    ways = ways_of(options, model, key)
    before = machine_rates(model.device, model.dtype)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    differences: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    passes: dict[str, list[int]] = {name: [] for name in ways}
    try:
        for number, frame in enumerate(tqdm(frames, unit="frame", disable=None)):
            chosen = {}
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                way = ways[name]
                found: dict[str, float] = {}
                way.prepare(frame)
                local = isinstance(way, Local)
                with staged(model.device, found) if local and number % 2 else nullcontext():
                    with timed(model.device, found):
                        chosen[name] = way(frame)
                if isinstance(way, Other):
                    found["total"] = way.milliseconds
                if number >= WARM_UP:
                    times[name].append(found)
                    if local and getattr(way.found, "token_passes", None) is not None:
                        passes[name].append(int(way.found.token_passes.max()))
            for name in names if number >= WARM_UP else ():
                check_actions(name, chosen[name], chosen["predict_action"])
                same = np.isclose(chosen[name], chosen["predict_action"], rtol=1e-5, atol=1e-6)
                if not same.all():
                    found_gap = token_gap(ways["predict_action"], frame, chosen[name], same)
                    differences[name].append({"frame": number - WARM_UP, "gap": found_gap})
    finally:
        for way in ways.values():
            way.close()
    rates = machine_rates(model.device, model.dtype)
    rates = {name: max(rate, before[name]) for name, rate in rates.items()}  # others may use the machine meanwhile
    with without_graphs():  # whose products cannot be counted
        work = {name: count_work(model, partial(way, frames[-1])) for name, way in ways.items() if _counts(way)}
    report = {
        **described(options, model),
        "frames": len(frames) - WARM_UP,
        **prepared,
        "machine": rates,
        "near": NEAR,
        "ways": {
            name: _figures(times[name], differences[name], passes[name], work.get(name, {}), rates) for name in ways
        },
    }
    return report


def token_gap(way: Local, frame: Frame, actions: np.ndarray, same: np.ndarray) -> float | None:
    """By how much the model of `way`, which predicted `frame` last, prefers its token to that of `actions`, in logits,
    where the first number differs; None of a head that chooses no tokens, or where the tokens are the same and units
    differ. Below `NEAR` it is rounding, which may go either way.

    Args:
        actions: Of another way, in the units of the dataset.
        same: Which of its numbers are equal; not all are.
    """
    model = way.model
    if not model.action_head.takes_drafts:
        return None
    mode = model.normalization.get(way.key, "bounds_q99")
    normalized = normalize_actions(actions, model.norm_stats[way.key]["action"], mode)
    place = int(same.reshape(-1).argmin())
    other = int(np.asarray(model.action_tokenizer.encode(normalized)).reshape(-1)[place])
    tokens = way.found.token_ids.reshape(-1)[: place + 1]
    if other == tokens[-1]:
        return None
    if way.preset is None:
        processor = model.processor
        inputs = dict(processor(processor.format_prompt(frame.instruction), frame.images, return_tensors="pt"))
    else:
        inputs = way.preset([frame])
    return gap(model, {**inputs, "state": frame.state}, tokens, other, way.key)


def _counts(way: Any) -> bool:
    """Drafts are counted where they are right: then a way has as many passes whenever it is asked."""
    return isinstance(way, Local) and way.drafts != "last"


def _figures(
    times: list[dict[str, float]],
    differences: list[dict[str, Any]],
    passes: list[int],
    work: dict[str, Any],
    rates: dict[str, float],
) -> dict[str, Any]:
    totals = [found["total"] for found in times if len(found) == 1]
    watched = [found for found in times if len(found) > 1]
    stages: dict[str, Any] = {}
    names = dict.fromkeys(name for found in watched for name in found)
    before = ["vision"] if "vision" not in names else []  # one graph of both
    together = {"prefill": [*before, "prefill"], "answer": ["vision", "prefill", "decode"]}
    for name in names:
        if name != "total":  # where drafts are right there are no passes of decoding
            stages[name] = quantiles([found.get(name, 0.0) for found in watched])
            parts = [work[part] for part in together.get(name, [name]) if part in work]
            all_of = {unit: sum(part[unit] for part in parts) for unit in ("gflop", "gbyte")}
            if all_of["gbyte"] and math.isfinite(all_of["gflop"]) and stages[name]["min_ms"]:
                limit = sum(limit_ms(part, rates) for part in parts)
                stages[name] |= {**all_of, "limit_ms": limit, "share": limit / stages[name]["min_ms"]}
    if stages:
        stages["other"] = quantiles(
            [found["total"] - sum(v for k, v in found.items() if k != "total") for found in watched]
        )
    return {
        **quantiles(totals or [found["total"] for found in times]),
        "same": 1 - len(differences) / len(times),
        "differences": differences,
        **({"passes": float(np.mean(passes))} if passes else {}),
        "stages": stages,
    }


def _gaps(differences: list[dict[str, Any]], of_tokens: bool) -> str:
    """The largest; "units" where actions of the same tokens differ."""
    gaps = [found["gap"] for found in differences]
    if None in gaps:
        return "units" if of_tokens else ""
    return f"{max(gaps):.1e}" if gaps else ""


def table(report: dict[str, Any]) -> str:
    """A line for each way, and for each stage of it."""
    rates = report["machine"]
    lines = [
        headline(report),
        f"measured here: {rates['gflops']:.0f} GFLOP/s, {rates['gbytes']:.1f} GB/s",
        "same: share of the actions of predict_action; gap: of the logits, where not; limit: what this machine allows",
        "way                    min ms      p50      p90      p99  same  gap      passes  limit ms  share",
    ]
    of_tokens = "passes" in report["ways"]["predict_action"]
    for name, row in report["ways"].items():
        times = " ".join(f"{row[part]:8.2f}" for part in QUANTILES)
        passes = f"{row['passes']:6.2f}" if "passes" in row else ""
        lines.append(
            f"{name:<20} {times} {row['same']:5.0%}  {_gaps(row['differences'], of_tokens):<7} {passes}".rstrip()
        )
        for stage_name, found in row["stages"].items():
            times = " ".join(f"{found[part]:8.2f}" for part in QUANTILES)
            limit = f"{found['limit_ms']:32.2f} {found['share']:6.0%}" if "share" in found else ""
            lines.append(f"  {stage_name:<18} {times} {limit}".rstrip())
    return "\n".join(lines)

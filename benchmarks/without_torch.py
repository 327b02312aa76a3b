"""An exported policy against the model in torch, on consecutive frames of closed-loop episodes: tokens and time.

    openvla export . outputs/onnx --to onnx
    python benchmarks/without_torch.py outputs/onnx                       # the embedded policy, 1000 frames of MT10
    python benchmarks/without_torch.py FOLDER --model MODEL --frames 200 --providers cpu --threads 2

The model in torch drives. Every frame is shown to all, one after the other and in changing order; pixels are made
before the clock starts. What a prediction takes is given by passes over the language model, as the least of all frames
(the machine may be shared), and over all frames as the mean of these, weighted by how often there were so many; by the
clock, and as time of the processor, which waiting for others does not count to.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from openvla.evaluation import make_environment
from openvla.policy import load_model


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "packages/openvla-runtime"))

from openvla_runtime import OnnxPolicy  # noqa: E402


def clocks() -> np.ndarray:
    """Seconds by the clock, and of the processor (all threads)."""
    return np.array([time.perf_counter(), time.process_time()])


def episodes(model, tasks: str, frames: int, length: int):
    """(image, instruction, whether an episode begins, prediction of the model, its seconds) of each step."""
    environment = make_environment("metaworld")
    shown = 0
    for seed in range(1_000_000, 2_000_000):
        for task in environment.task_sets.get(tasks) or tasks.split(","):
            observation = environment.reset(seed, task)
            for step in range(length):
                image = next(iter(observation.images.values()))
                inputs = model.processor(model.processor.format_prompt(observation.instruction), image)
                start = clocks()
                prediction = model.predict_action(**inputs, return_dict=True)
                seconds = clocks() - start
                yield image, observation.instruction, step == 0, prediction, seconds
                shown += 1
                if shown == frames:
                    return
                observation, success = environment.step(prediction.actions)
                if success:
                    break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path, help="folder that `openvla export --to onnx` wrote")
    parser.add_argument("--model", default=str(ROOT), help="what it was made of; default: the embedded policy")
    parser.add_argument("--tasks", default="mt10", help="of Meta-World; default: %(default)s")
    parser.add_argument("--frames", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=120, help="most steps of an episode; default: %(default)s")
    parser.add_argument("--providers", nargs="+", default=["cpu", "openvino"], help="default: cpu openvino")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = load_model(arguments.model, dtype="float32")
    policies = {
        f"{provider}{', drafts' if drafts else ''}": OnnxPolicy(
            arguments.exported, provider=provider, threads=arguments.threads, drafts=drafts
        )
        for provider in arguments.providers
        for drafts in (False, True)
    }
    equal, off = Counter(), defaultdict(list)
    times: dict[str, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    frames = episodes(model, arguments.tasks, arguments.frames, arguments.length)
    order = list(policies)
    for image, instruction, begins, expected, seconds in tqdm(frames, total=arguments.frames):
        times["torch"][expected.token_ids.size].append(seconds)
        order = order[1:] + order[:1]
        for name in order:
            policy = policies[name]
            if begins:
                policy.reset()
            pixels = OnnxPolicy.pixel_values(policy, [image])
            policy.pixel_values = lambda images, pixels=pixels: pixels
            start = clocks()
            found = policy.predict(image, instruction)
            times[name][found.passes].append(clocks() - start)
            equal[name] += bool((found.token_ids == expected.token_ids).all())
            off[name].append(np.abs(found.normalized_actions - expected.normalized_actions).mean())

    report = {}
    for name, by_passes in times.items():
        shares = {passes: len(taken) / arguments.frames for passes, taken in sorted(by_passes.items())}
        least = {passes: 1e3 * np.min(by_passes[passes], axis=0) for passes in shares}
        ms, processor_ms = sum(share * least[passes] for passes, share in shares.items())
        taken = np.concatenate(list(by_passes.values()))
        report[name] = {
            "ms": ms,
            "processor_ms": processor_ms,
            "p50_ms": 1e3 * float(np.median(taken[:, 0])),
            "passes": sum(passes * share for passes, share in shares.items()),
            "share_by_passes": shares,
            "least_ms_by_passes": {passes: both.tolist() for passes, both in least.items()},
        }
        if name != "torch":
            report[name] |= {"same_tokens": equal[name] / arguments.frames, "mean_l1": float(np.mean(off[name]))}
    for name, row in report.items():
        said = "" if name == "torch" else f", same tokens {row['same_tokens']:.1%}, L1 {row['mean_l1']:.5f}"
        least = ", ".join(f"{passes}: {ms[0]:.1f} / {ms[1]:.1f}" for passes, ms in row["least_ms_by_passes"].items())
        taken = f"{row['ms']:6.1f} ms, of the processor {row['processor_ms']:6.1f}, p50 {row['p50_ms']:6.1f}"
        print(f"{name:18} {taken}; {row['passes']:.2f} passes ({least}){said}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

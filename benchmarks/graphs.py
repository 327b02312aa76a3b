"""Time plain decoding, own steps, drafts and CUDA graphs in turns, random weights of a published size or a model.

    python benchmarks/graphs.py --preset openvla-7b --device cuda --batches 1,16 --output graphs.json

Every prediction is of inputs that are on the device already. Tokens are compared with those of plain decoding up to the
first difference; random weights have logits near each other, so that the roundings of half precision decide some.
"""

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from openvla import OpenVLAForActionPrediction
from openvla.bench.subject import random_model
from openvla.device import synchronize
from openvla.graphs_openvla import _PREPARED, plain_decoding, without_graphs
from openvla.policy import QUANTIZATIONS, quantization_of
from openvla.quantization_openvla import OpenVLAQuantizationConfig, quantize_linears
from openvla.recordings_openvla import Snapshot


ROOT = Path(__file__).resolve().parents[1]


def random_inputs(model, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of the published sizes for a model without tokenizer: 20 prompt tokens, the first of them BOS."""
    towers, size = len(model.config.timm_model_ids), model.config.image_sizes[0]
    input_ids = torch.randint(3, 30000, (batch, 20), device=model.device)
    input_ids[:, 0] = model.config.text_config.bos_token_id
    channels = 3 * towers * len(model.camera_names)
    pixel_values = torch.randn(batch, channels, size, size, device=model.device, dtype=model.dtype)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


def timed(model, function) -> tuple[object, float]:
    synchronize(model.device)
    started = time.perf_counter()
    found = function()
    synchronize(model.device)
    return found, 1000 * (time.perf_counter() - started)


def summary(milliseconds: list[float]) -> dict[str, float]:
    parts = {f"p{part}": float(np.percentile(milliseconds, part)) for part in (50, 90, 99)}
    return {name: round(value, 3) for name, value in {"min": min(milliseconds), **parts}.items()}


def measure(model, batch: int, rounds: int, compile: bool) -> dict:
    samples = [random_inputs(model, batch) for _ in range(6)]
    for inputs in samples:
        inputs["input_ids"].remainder_(500).clamp_(3)[:, 0] = model.config.text_config.bos_token_id
    done = model.prepare_for_inference((batch,), (samples[0]["input_ids"].shape[1] + 1,), compile=compile)
    ways = {
        "library": (plain_decoding, False),
        "own": (without_graphs, False),
        "own, right draft": (without_graphs, True),
    }
    if done.graphs:
        ways |= {"graphs": (nullcontext, False), "graphs, right draft": (nullcontext, True)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    passes: dict[str, int] = {}
    for number in range(-2, rounds):
        inputs = samples[number % len(samples)]
        chosen = None
        for name, (way, drafted) in ways.items():
            with way():
                found, milliseconds = timed(
                    model,
                    lambda inputs=inputs, draft=chosen if drafted else None: model.predict_action(
                        **inputs, draft=draft, return_dict=True
                    ),
                )
            chosen = chosen if drafted else found.token_ids
            passes[name] = int(found.token_passes.max())
            if number >= 0:
                times[name].append(milliseconds)
                tokens[name].append(found.token_ids.reshape(batch, -1))
    plain = np.concatenate(tokens["library"])
    report = {
        "prepared": {**asdict(done), "seconds": round(done.seconds, 2)},
        "ms": {name: summary(values) for name, values in times.items()},
        "passes": passes,
        "equal tokens": {
            name: f"{int((np.concatenate(rows) == plain).cumprod(axis=1).sum())} of {plain.size}"
            for name, rows in tokens.items()
        },
    }
    if model in _PREPARED:
        first = _PREPARED[model].graphs[0]
        graphs = {"an answer": first.answering, "prompt and draft": first.prefilling, "tokens again": first.stepping}
        for name, graph in graphs.items():
            report[f"ms of the graph: {name}"] = summary([timed(model, graph.replay)[1] for _ in range(20)])
    snapshot = Snapshot(model)
    report["ms to see that nothing has changed"] = summary(
        [timed(model, lambda: snapshot.is_of(model))[1] for _ in range(20)]
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the embedded policy)")
    parser.add_argument("--preset", choices=["openvla-7b", "openvla-v01-7b"], help="random weights of a published size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--batches", default="1", help="batch sizes, joined by commas; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="graphs of compiled kernels")
    parser.add_argument("--quantization", choices=["int8", "int4", "fp8"], help="of a preset")
    parser.add_argument("--rounds", type=int, default=12, help="predictions of each way; default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quantization and not arguments.preset:
        parser.error("--quantization is of a --preset; a folder is as `openvla quantize` wrote it.")
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    if arguments.preset:
        model = random_model(arguments.preset, arguments.device, dtype)
        if arguments.quantization:
            quantize_linears(model, OpenVLAQuantizationConfig(QUANTIZATIONS[arguments.quantization]["bits"]))
    else:
        model = OpenVLAForActionPrediction.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    cuda = arguments.device.startswith("cuda")
    report = {
        "model": arguments.preset or Path(arguments.model).name,
        "device": torch.cuda.get_device_name() if cuda else arguments.device,
        "dtype": arguments.dtype,
        "quantization": quantization_of(model),
        "torch": torch.__version__,
    }
    for batch in map(int, arguments.batches.split(",")):
        report[f"batch {batch}"] = measure(model, batch, arguments.rounds, arguments.compile)
        report["peak memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None
        text = json.dumps(report, indent=1)
        print(text, flush=True)
        if arguments.output:
            arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

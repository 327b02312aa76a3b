"""Time one prediction by stage: processor, towers, projector, prefill, every decode step, total.

    python benchmarks/predict.py                                        # the embedded policy
    python benchmarks/predict.py --model DIR_OR_ID --device cuda --dtype bfloat16
    python benchmarks/predict.py --preset openvla-7b --device cuda      # full size, random weights: no download
    python benchmarks/predict.py --preset openvla-7b --device cuda --head l1_regression --chunk 8 --cameras 2 --state 8

Stages are timed inside `predict_action`, with the device synchronized at their borders; the total is timed in separate
runs without that. Prints a table and writes JSON.
"""

import argparse
import json
import platform
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from PIL import Image

from openvla import OpenVLAForActionPrediction, OpenVLAImageProcessor, OpenVLAProcessor
from openvla.device import synchronize
from openvla.parts_openvla import PARTS
from openvla.policy import QUANTIZATIONS, load_model
from openvla.presets import load_preset_config, load_preset_statistics
from openvla.quantization_openvla import OpenVLAQuantizationConfig, quantize_linears


ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = "pick up the coffee mug and place it on the shelf"


@contextmanager
def stage_clock(model, stages: dict[str, list[float]]):
    """Append the milliseconds of every forward of towers, projector and language model to `stages`."""
    started, handles, calls = {}, [], {"n": 0}

    def before(name):
        def hook(*_):
            synchronize(model.device)
            started[name] = time.perf_counter()

        return hook

    def after(name):
        def hook(*_):
            synchronize(model.device)
            label = name
            if name == "language_model":
                label = "prefill" if calls["n"] == 0 else f"decode {calls['n']}"
                calls["n"] += 1
            stages.setdefault(label, []).append(1000 * (time.perf_counter() - started[name]))

        return hook

    modules = {"towers": model.vision_backbone, "projector": model.projector, "language_model": model.language_model}
    if model.action_head.parallel:
        modules["language_model"] = model.get_decoder()
    for name, module in modules.items():
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_model(preset: str, device: str, dtype: torch.dtype, **fields) -> OpenVLAForActionPrediction:
    """A published configuration, with `fields` changed, and random weights, made on the device itself."""
    config = load_preset_config(preset)
    for name, value in fields.items():
        setattr(config, name, value)
    config.check_fields()
    config.norm_stats = {"bridge_orig": load_preset_statistics("openvla-7b")["bridge_orig"]}
    config.empty_token_id = 29871
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = OpenVLAForActionPrediction(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def random_inputs(model, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of the published sizes for a model without tokenizer: 20 prompt tokens, the first of them BOS."""
    towers, size = len(model.config.timm_model_ids), model.config.image_sizes[0]
    input_ids = torch.randint(3, 30000, (batch, 20), device=model.device)
    input_ids[:, 0] = model.config.text_config.bos_token_id
    channels = 3 * towers * len(model.camera_names)
    pixel_values = torch.randn(batch, channels, size, size, device=model.device, dtype=model.dtype)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


def add_part_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of a preset")
    group.add_argument("--head", default="tokens", help="tokens, parallel_tokens, l1_regression or diffusion")
    group.add_argument("--chunk", type=int, default=1, help="steps of one prediction; default: %(default)s")
    group.add_argument("--cameras", type=int, default=1, help="images of one prediction; default: %(default)s")
    group.add_argument("--state", type=int, default=0, help="numbers of the state; default: %(default)s, none")
    group.add_argument("--film", action="store_true", help="towers with FiLM")


def parts_asked_for(arguments) -> dict:
    """Fields of the configuration for the options of `add_part_options`."""
    return {
        "action_head": arguments.head,
        "action_chunk": arguments.chunk,
        "action_dim": 7,
        "camera_names": ["primary", *(f"camera{number}" for number in range(1, arguments.cameras))],
        "proprio_dim": arguments.state or None,
        "use_film": arguments.film,
    }


def summary(values: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(values, n=10) if len(values) > 1 else values * 2
    return {"median_ms": statistics.median(values), "p10_ms": low, "p90_ms": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the embedded policy)")
    parser.add_argument("--preset", choices=["openvla-7b", "openvla-v01-7b"], help="random weights of a published size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default=None, help="default: as stored; bfloat16 for a preset")
    parser.add_argument(
        "--quantization", choices=list(QUANTIZATIONS), help="of the language model; a preset: ours only"
    )
    parser.add_argument("--batch", type=int, default=1, help="images predicted at once; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU; default: %(default)s")
    parser.add_argument("--runs", type=int, default=20, help="predictions that are timed; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=3, help="predictions before these; default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    add_part_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    if arguments.preset:
        dtype = getattr(torch, arguments.dtype or "bfloat16")
        model = random_model(arguments.preset, arguments.device, dtype, **parts_asked_for(arguments))
        if arguments.quantization:
            quantize_linears(model, OpenVLAQuantizationConfig(QUANTIZATIONS[arguments.quantization]["bits"]))
        if arguments.state:
            proprio = {"q01": [-1.0] * arguments.state, "q99": [1.0] * arguments.state}
            model.config.norm_stats["bridge_orig"]["proprio"] = proprio
        image_processor = OpenVLAImageProcessor.from_pretrained(ROOT / "presets" / arguments.preset)
        inputs = random_inputs(model, arguments.batch)
        processor = None
    else:
        model = load_model(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype or "auto",
            quantization=arguments.quantization,
        )
        processor = OpenVLAProcessor.from_pretrained(arguments.model)
        image_processor, inputs = processor.image_processor, None
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    frames, key = [frame] * arguments.batch * len(model.camera_names), next(iter(model.norm_stats))

    def process():
        if processor is None:
            return image_processor(frames, return_tensors="pt")
        prompts = processor.format_prompt([INSTRUCTION] * arguments.batch)
        return processor(prompts, [dict.fromkeys(model.camera_names, frame)] * arguments.batch)

    inputs = inputs or process()
    if model.config.proprio_dim:
        inputs = {**inputs, "state": np.zeros((arguments.batch, model.config.proprio_dim))}
    stages: dict[str, list[float]] = {}
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    for run in range(-arguments.warmup, arguments.runs):
        collected = stages if run >= 0 else {}
        begin = time.perf_counter()
        process()
        collected.setdefault("processor", []).append(1000 * (time.perf_counter() - begin))
        with stage_clock(model, collected):
            model.predict_action(**inputs, unnorm_key=key)
    totals = []
    for run in range(-arguments.warmup, arguments.runs):
        synchronize(model.device)
        begin = time.perf_counter()
        process()
        model.predict_action(**inputs, unnorm_key=key)
        synchronize(model.device)
        if run >= 0:
            totals.append(1000 * (time.perf_counter() - begin))

    cuda = arguments.device.startswith("cuda")
    report = {
        "model": arguments.preset or arguments.model.replace(str(ROOT), "embedded policy"),
        "weights": "random" if arguments.preset else "loaded",
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": arguments.quantization,
        "attention": model.language_model.config._attn_implementation,
        "batch": arguments.batch,
        **{name: getattr(model.config, name) for name in PARTS},
        "action_chunk": model.action_chunk,
        "cameras": len(model.camera_names),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "runs": arguments.runs,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, timm)},
        "stages": {name: summary(values) for name, values in stages.items()},
        "total": summary(totals),
        "actions_per_second": arguments.batch * 1000 / statistics.median(totals),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }
    for name, times in [*report["stages"].items(), ("total", report["total"])]:
        print(f"{name:<10} {times['median_ms']:9.2f} ms   {times['median_ms'] / report['total']['median_ms']:5.0%}")
    print(f"{report['actions_per_second']:.2f} predictions/s of {model.action_chunk} step(s)")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {arguments.output}")
    else:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

r"""Time training steps by strategy: samples/s, peak memory, and the share of the device's peak that the model uses.

    python benchmarks/train.py                                                  # the embedded policy, all strategies
    python benchmarks/train.py --model DIR_OR_ID --strategy lora --device cuda
    python benchmarks/train.py --preset openvla-7b --device cuda --strategy lora    # full size, random weights
    python benchmarks/train.py --preset openvla-7b --device cuda --strategy lora --batch 8 --text-tokens 100 \
        --head l1_regression --chunk 8 --cameras 2 --state 8                        # as OpenVLA-OFT trains

A step is forward, backward, clipping and AdamW on random inputs. Every strategy runs in a process of its own, so that
none inherits the memory of another. The FLOPs are those of `openvla.training.plan` (recomputation not counted); the
peak is that of a large matrix product measured beside them, or `--peak-tflops`. Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import transformers
from peft import LoraConfig, get_peft_model

from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.device import synchronize
from openvla.presets import load_preset_config
from openvla.training import STRATEGIES, apply_strategy, qlora_quantization, trainable_parameters
from openvla.training.plan import estimate
from openvla.training.step_cost import TEXT_TOKENS, training_inputs
from openvla.training.strategies import checkpoint_activations


ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ("lora", "qlora")


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


def measured_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two (size, size) matrices, the best of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize(device)
        begin = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times[2:])


def load(arguments, strategy: str):
    """The model of a strategy in the types of a run: what learns in float32, the rest in that of the precision."""
    bf16 = arguments.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    loading = {"dtype": dtype, "device_map": {"": arguments.device}}
    if strategy == "qlora":
        loading["quantization_config"] = qlora_quantization(torch.bfloat16 if bf16 else torch.float32)
    options = {"rank": arguments.rank} if strategy in ADAPTERS else {}
    if arguments.preset:
        model = random_model(arguments, dtype)
        if strategy == "qlora":  # quantization happens while a checkpoint is loaded
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                del model
                model = OpenVLAForActionPrediction.from_pretrained(folder, **loading)
    else:
        model = OpenVLAForActionPrediction.from_pretrained(arguments.model, **loading)
    added = list(model.added_parameters().values())
    model = apply_strategy(model, strategy, **options)
    for parameter in added:
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def random_model(arguments, dtype: torch.dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(arguments.device):
            return OpenVLAForActionPrediction(preset_config(arguments))
    finally:
        torch.set_default_dtype(default)


def preset_config(arguments) -> OpenVLAConfig:
    config = load_preset_config(arguments.preset)
    for name, value in parts_asked_for(arguments).items():
        setattr(config, name, value)
    return config


def measure(arguments, strategy: str) -> dict:
    """One strategy in this process."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    if strategy in ADAPTERS:
        # PEFT imports much at its first adapter; what imports take is not what the run takes.
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(1, 1)), LoraConfig(target_modules=["0"]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = load(arguments, strategy).train()
    if arguments.gradient_checkpointing:
        checkpoint_activations(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, weight_decay=0.0)
    shape = (arguments.chunk, 7)
    inputs = training_inputs(model.config, arguments.batch, arguments.text_tokens, shape)
    inputs["pixel_values"].normal_()
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).action_head
    batch = head.prepare({name: value.to(device) for name, value in inputs.items()})
    times = []
    for step in range(-arguments.warmup, arguments.steps):
        synchronize(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if arguments.precision == "bf16" else nullcontext():
            loss, _ = head.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        if step >= 0:
            times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "strategy": strategy,
        "trainable": trainable_parameters(model),
        "seconds_per_step": statistics.median(times),
        "samples_per_second": arguments.batch / statistics.median(times),
        "peak_memory_bytes": peak if cuda else peak - before,
        "memory_before_bytes": None if cuda else before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the embedded policy)")
    parser.add_argument("--preset", choices=["openvla-7b", "openvla-v01-7b"], help="random weights of a published size")
    parser.add_argument(
        "--strategy", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), help="default: all"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=["bf16", "float32"], help="default: bf16 on cuda, float32 elsewhere")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step; default: %(default)s")
    parser.add_argument(
        "--text-tokens", type=int, default=TEXT_TOKENS, help="tokens of a prompt with its action; default: %(default)s"
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of adapters (lora, qlora); default: %(default)s")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations again instead of keeping them"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these; default: %(default)s")
    parser.add_argument(
        "--peak-tflops", type=float, help="TFLOP/s of the device (default: measured with a matrix product)"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    add_part_options(parser)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # what the processes are started with
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    arguments.precision = arguments.precision or ("bf16" if cuda else "float32")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.one:
        print(json.dumps(measure(arguments, arguments.strategy[0])))
        return

    config = preset_config(arguments) if arguments.preset else OpenVLAConfig.from_pretrained(arguments.model)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    peak = (arguments.peak_tflops or measured_peak(device, dtype, 8192 if cuda else 2048) / 1e12) * 1e12
    if cuda:
        torch.cuda.empty_cache()  # the processes need what the product took
    runs = []
    for strategy in arguments.strategy:
        result = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", "--strategy", strategy],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        )
        if result.returncode:
            print(f"{strategy:<14} failed (its error stands above)")
            runs.append({"strategy": strategy, "failed": result.returncode})
            continue
        run = json.loads(result.stdout.splitlines()[-1])
        options = {"rank": arguments.rank} if strategy in ADAPTERS else {}
        plan = estimate(
            config,
            strategy,
            batch_size=arguments.batch,
            precision=arguments.precision,
            text_tokens=arguments.text_tokens,
            shape=(arguments.chunk, 7),
            gradient_checkpointing=arguments.gradient_checkpointing,
            **options,
        )
        run["planned_memory_bytes"] = plan.total
        run["flops_per_sample"] = plan.flops_per_sample
        run["model_flops_utilization"] = run["samples_per_second"] * plan.flops_per_sample / peak
        runs.append(run)
        print(
            f"{strategy:<14} {run['trainable'] / 1e6:9.1f} M learn {run['samples_per_second']:9.2f} samples/s "
            f"{run['peak_memory_bytes'] / 1e9:8.2f} GB peak (plan {plan.total / 1e9:.2f}) "
            f"{run['model_flops_utilization']:6.1%} of {peak / 1e12:.2f} TFLOP/s",
            flush=True,
        )
    report = {
        "model": arguments.preset or arguments.model.replace(str(ROOT), "embedded policy"),
        "weights": "random" if arguments.preset else "loaded",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "precision": arguments.precision,
        "batch": arguments.batch,
        **(parts_asked_for(arguments) if arguments.preset else {}),
        "text_tokens": arguments.text_tokens,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "steps": arguments.steps,
        "peak_flops": peak,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, timm)},
        "runs": runs,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {arguments.output}")
    else:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Time the linear layers of a model in float, 8 bits, 4 bits and fp8, by the number of tokens, beside what memory can.

    python benchmarks/linears.py --device cuda --dtype bfloat16
    python benchmarks/linears.py --width 1024 --inner 2816 --dtype float32

One block of a Llama: four layers width x width, two width x inner, one inner x width. The limit is the time to read its
weights once, at the rate at which the device copies a large tensor.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from openvla.device import synchronize
from openvla.quantization_openvla import LINEARS


def block(width: int, inner: int, dtype: torch.dtype, device: str, bits: int | str | None) -> list[nn.Module]:
    """The layers, with random weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]:
        layer: nn.Module = nn.Linear(inputs, outputs, bias=False)
        if bits:
            stored = LINEARS[bits].quantize(layer.weight)
            layer = LINEARS[bits](inputs, outputs, bias=False)
            layer.load_state_dict(stored)
        layers.append(layer.to(device, dtype))
    return layers


def call(layers: list[nn.Module], inputs: dict[int, torch.Tensor]) -> None:
    for layer in layers:
        layer(inputs[layer.in_features])


def least(run, device: str, rounds: int) -> tuple[float, float]:
    """Least and median milliseconds; on a GPU of the device's own clock."""
    times = []
    for _ in range(3):
        run()
    for _ in range(rounds):
        synchronize(torch.device(device))
        if device.startswith("cuda"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            synchronize(torch.device(device))
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
    return min(times), statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="default: %(default)s, as 7B")
    parser.add_argument("--inner", type=int, default=11008, help="default: %(default)s, as 7B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 7, 8, 16, 276], help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, device = getattr(torch, arguments.dtype), arguments.device

    source = torch.ones(256 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / (least(lambda: target.copy_(source), device, 10)[0] / 1000)  # bytes in a second
    blocks = {
        name: block(arguments.width, arguments.inner, dtype, device, bits)
        for name, bits in ((arguments.dtype, None), ("int8", 8), ("int4", 4), ("fp8", "fp8"))
    }
    figures = []
    for rows in arguments.rows:
        inputs = {
            size: torch.randn(rows, size, device=device, dtype=dtype) for size in (arguments.width, arguments.inner)
        }
        for name, layers in blocks.items():
            run = partial(call, layers, inputs)
            found = least(run, device, arguments.rounds)
            size = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
            limit = 1000 * size / rate
            figures.append({"rows": rows, "weights": name, "ms": found[0], "median_ms": found[1], "limit_ms": limit})
            print(
                f"{rows:4} rows  {name:9} {found[0]:9.3f} ms  (median {found[1]:.3f}, reading {limit:.3f})", flush=True
            )
    about = torch.cuda.get_device_name() if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    report = {"device": about, "torch": torch.__version__, "copy_gb_per_s": rate / 1e9, "figures": figures}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{about}, torch {torch.__version__}, copies {rate / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()

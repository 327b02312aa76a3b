"""What serving costs: latency and actions/s against robots, batched and not, beside direct calls in the same run.

    python benchmarks/serve.py                                       # the embedded policy; minutes
    python benchmarks/serve.py --model DIR_OR_ID --device cuda --dtype bfloat16 --robots 1 4 16 64 --seconds 10

`openvla serve` runs as a process of its own. Robots ask by `openvla_client`, as fast as they are answered, with a
256 x 256 frame that no other request has. One robot: the same model is called directly here as often, in an order that
is drawn each time: a busy machine slows down all ways, and each follows each, which matters where the last cache holds
the weights of one process. Many robots, in turns as well: a server with --max-batch 16, one with --max-batch 1, and the
roofline, direct calls of as many requests. Prints a table and writes JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openvla.observation import Observation
from openvla.options.prediction import EMBEDDED_POLICY
from openvla.options.serving import ServeOptions
from openvla.serving.contract import Request
from openvla.serving.engine import Engine
from openvla.serving.model import OpenVLAModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "packages/openvla-client"))

from openvla_client import AsyncClient, connect_async  # noqa: E402


INSTRUCTION = "open the drawer"
NUMBERS = count()


class Frames:
    """Frames that differ: one of a real scene, moved and with a number in its corner."""

    def __init__(self) -> None:
        image = Image.open(ROOT / "examples/frames/drawer-open-v3_step005.png").convert("RGB").resize((256, 256))
        self.scene = np.asarray(image)

    def __call__(self) -> np.ndarray:
        number = next(NUMBERS)
        frame = np.roll(self.scene, (number % 9, number % 7), axis=(0, 1))
        frame[0, :3, 0] = number % 256, number // 256 % 256, number // 65536
        return frame


FRAME = Frames()


@contextmanager
def server(arguments: argparse.Namespace, max_batch: int) -> Iterator[str]:
    """HOST:PORT of `openvla serve`, once it is warm."""
    command = [str(Path(sys.executable).with_name("openvla")), "serve", "--port", "0", "--max-batch", str(max_batch)]
    command += ["--model", arguments.model, "--device", arguments.device, "--dtype", arguments.dtype]
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http://" in line), None)
        if line is None:
            raise SystemExit("The server did not start.")
        yield re.split("[,;/ ]", line.split("http://")[1])[0]
    finally:
        process.terminate()
        process.wait(60)


def summary(times: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(times), 2),
        "p99_ms": round(float(np.percentile(times, 99)), 2),
        "requests": len(times),
    }


async def timed(work: Any) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    begin = time.perf_counter()
    found = await work
    return 1000 * (time.perf_counter() - begin), found


# One robot ------------------------------------------------------------------------------------------------------------


async def one_robot(model: OpenVLAModel, address: str, requests: int) -> dict[str, Any]:
    """Every way as often, in an order that is drawn each time: direct, through the engine alone, both protocols."""
    engine = Engine(model)
    await engine.start()
    async with await connect_async(f"ws://{address}") as socket, await connect_async(f"http://{address}") as rest:

        async def direct() -> None:
            model.act([request(model, FRAME(), "direct")])

        async def by_engine() -> float:
            return (await engine.act(request(model, FRAME(), "engine"))).timing["infer_ms"]

        async def ask(client: AsyncClient) -> float:
            return (await client.act(FRAME(), INSTRUCTION)).timing["infer_ms"]

        ways = {
            "direct": direct, "engine": by_engine, "websocket": lambda: ask(socket), "http": lambda: ask(rest),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in ways}
        around: dict[str, list[float]] = {name: [] for name in ways}
        order = random.Random(0)
        for number in range(requests + 3):
            for name in order.sample(list(ways), len(ways)):
                taken, inferred = await timed(ways[name]())
                if number >= 3:
                    times[name].append(taken)
                    around[name].append(taken - (taken if inferred is None else inferred))
    await engine.stop()
    found: dict[str, Any] = {name: summary(values) for name, values in times.items()}
    for name in list(ways)[1:]:
        for which in ("p50_ms", "p99_ms"):
            found[name][f"above_direct_{which}"] = round(found[name][which] - found["direct"][which], 2)
        found[name] |= {f"around_model_{which}": value for which, value in summary(around[name]).items()}
    return found


def request(model: OpenVLAModel, frame: np.ndarray, session: str) -> Request:
    dataset = next(iter(model.info.datasets))
    state = np.zeros(model.info.datasets[dataset].state_dim or 0, np.float32)
    return Request(Observation(dict.fromkeys(model.info.cameras, frame), state, INSTRUCTION), dataset, session)


# Many robots ----------------------------------------------------------------------------------------------------------


class Measured:
    """Requests of so many robots, in several slices of time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sizes: list[float] = []
        self.seconds = 0.0

    def summary(self) -> dict[str, float]:
        rate = round(len(self.times) / self.seconds, 2)
        return {**summary(self.times), "actions_per_second": rate, "batch_size": round(statistics.mean(self.sizes), 1)}


def call_directly(model: OpenVLAModel, robots: int, seconds: float, measured: Measured) -> None:
    """The roofline: all robots in one call, nothing between two calls but new frames."""
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        requests = [request(model, FRAME(), f"robot {robot}") for robot in range(robots)]
        asked = time.perf_counter()
        model.act(requests)
        taken = time.perf_counter() - asked
        measured.times += [1000 * taken] * robots
        measured.sizes += [robots] * robots
        measured.seconds += taken


async def ask_server(address: str, robots: int, seconds: float, measured: Measured) -> None:
    """Each robot asks again as soon as it is answered. A batch or two at the beginning do not count."""
    clients = await asyncio.gather(*(connect_async(f"ws://{address}", timeout=60) for _ in range(robots)))
    await asyncio.gather(*(client.act(FRAME(), INSTRUCTION) for client in clients))
    begin = time.perf_counter()

    async def robot(client: AsyncClient) -> None:
        while time.perf_counter() < begin + seconds:
            taken, answer = await timed(client.act(FRAME(), INSTRUCTION))
            measured.times.append(taken)
            measured.sizes.append(answer.timing["batch_size"])

    await asyncio.gather(*map(robot, clients))
    measured.seconds += time.perf_counter() - begin
    await asyncio.gather(*(client.close() for client in clients))


def many_robots(
    model: OpenVLAModel, batched: str, unbatched: str, arguments: argparse.Namespace
) -> dict[int, dict[str, dict[str, float]]]:
    """In turns, so that a busy machine slows down all alike."""
    found = {}
    for robots in arguments.robots:
        ways = {name: Measured() for name in ("batched", "unbatched", "direct")}
        for _ in range(arguments.rounds):
            for address, name in ((batched, "batched"), (unbatched, "unbatched")):
                asyncio.run(ask_server(address, robots, arguments.seconds, ways[name]))
            call_directly(model, robots, arguments.seconds, ways["direct"])
        found[robots] = {name: measured.summary() for name, measured in ways.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_POLICY, help="folder or Hub id; default: the embedded policy")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each slice; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="slices of each way; default: %(default)s")
    parser.add_argument("--requests", type=int, default=200, help="of one robot, each way; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: those of torch")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = OpenVLAModel.load(ServeOptions(model=arguments.model, device=arguments.device, dtype=arguments.dtype))
    model.warm_up([1])
    report: dict[str, Any] = {
        "model": model.info.model, "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda")
        else platform.processor() or platform.machine(),
        "threads": arguments.threads, "dtype": arguments.dtype, "torch": torch.__version__,
    }  # fmt: skip
    with server(arguments, 16) as batched, server(arguments, 1) as unbatched:
        report["one_robot"] = asyncio.run(one_robot(model, batched, arguments.requests))
        report["robots"] = many_robots(model, batched, unbatched, arguments)

    for name, row in report["one_robot"].items():
        line = f"one robot, {name:<10} p50 {row['p50_ms']:8.2f} ms, p99 {row['p99_ms']:8.2f} ms"
        if name != "direct":
            line += (
                f"; above direct {row['above_direct_p50_ms']:+.2f} and {row['above_direct_p99_ms']:+.2f}, around the "
                f"model {row['around_model_p50_ms']:.2f} and {row['around_model_p99_ms']:.2f}"
            )
        print(line)
    for robots, ways in report["robots"].items():
        for name, row in ways.items():
            print(
                f"{robots:3} robots, {name:<9} {row['actions_per_second']:7.1f} actions/s, p50 {row['p50_ms']:7.1f}, "
                f"p99 {row['p99_ms']:8.1f} ms, batches of {row['batch_size']:.1f}"
            )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

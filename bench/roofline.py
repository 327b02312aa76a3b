"""What the hardware allows: no stage is faster than its products at the measured rate of products of matrices, or than
its weights at the measured rate of the memory."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..device import synchronize
from ..products_openvla import product_for
from ..quantized_linear_openvla import is_rounded
from ..stages_openvla import watch_stages
from ..vision_openvla import TOWERS


ROUNDS = 5
BEHIND = ("norm", "fc_norm", "attn_pool", "head")  # the blocks of a tower


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured here: `gflops` of a product of square matrices in `dtype`, by the faster of the ways that predictions
    multiply, and `gbytes` a second that a copy moves."""
    side, count = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 26)
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        ways = {torch.nn.functional.linear, product_for(left)}
    seconds = min(_best(device, partial(way, left, right)) for way in ways)
    return {
        "gflops": 2 * side**3 / seconds / 1e9,
        "gbytes": 2 * source.nbytes / _best(device, lambda: target.copy_(source)) / 1e9,  # read and written
    }


def _best(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def count_work(model: Any, predict: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """{stage: {"gflop", "gbyte"}} of one prediction: products and attention as torch counts them (NaN where weights are
    quantized, whose products it does not know, and which are not as fast as `machine_rates` has them), and the weights
    that every pass reads, without what activations and caches take."""
    work: dict[str, dict[str, float]] = {}
    seeing, decoder = (model.vision_backbone, model.projector), model.get_decoder()
    weights = {"vision": _bytes(*seeing) - sum(map(_unread, model.vision_backbone.modules()))}
    weights["prefill"] = weights["decode"] = _bytes(decoder) - _bytes(model.get_input_embeddings())
    unknown = {"vision"} if any(is_rounded(weight) for part in seeing for weight in part.parameters()) else set()
    unknown |= {"prefill", "decode"} if any(map(is_rounded, decoder.parameters())) else set()

    @contextmanager
    def watcher(name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        found = work.setdefault(name, {"gflop": 0.0, "gbyte": 0.0})
        found["gflop"] += math.nan if name in unknown else counter.get_total_flops() / 1e9
        found["gbyte"] += weights.get(name, 0) / 1e9

    with watch_stages(watcher):
        predict()
    return work


def _bytes(*modules: nn.Module) -> int:
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def _unread(tower: nn.Module) -> int:
    """Bytes of a vision tower that published files hold and no prediction reads: its last block and all behind it."""
    if not isinstance(tower, TOWERS):
        return 0
    return _bytes(*(part for name, part in tower.named_children() if name in BEHIND), tower.blocks[-1])


def limit_ms(work: dict[str, float], rates: dict[str, float]) -> float:
    return 1000 * max(work["gflop"] / rates["gflops"], work["gbyte"] / rates["gbytes"])

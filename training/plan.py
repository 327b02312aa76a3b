"""What a run needs, from the configuration alone: memory of one device by part, trainable parameters, FLOPs.

    python -m openvla.training.plan openvla-v01-7b                              # a preset, a folder or a Hub id
    python -m openvla.training.plan openvla-7b --batch-size 32 --world-size 64 --sharded

The training step itself runs, on tensors that have shapes and types but no values (torch's FakeTensorMode): what the
forward pass keeps for the backward pass, and every multiplication, is counted and not guessed. What this cannot see:
the allocator's slack, workspaces, the CUDA context (one to a few GB together), short-lived tensors of the backward
pass, and where CUDA kernels keep other tensors than those of the CPU.
"""

import argparse
import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..action_heads_openvla import head_without_weights
from ..choices_openvla import check_choice
from ..configuration_openvla import OpenVLAConfig
from ..extras import ignore_library_warnings, require
from ..modeling_openvla import OpenVLAForActionPrediction
from ..presets import load_preset_config, preset_names
from ..quantization_openvla import NOT_QUANTIZED
from .muon import is_orthogonalized
from .step_cost import run_step, usual_shape, usual_text
from .strategies import STRATEGIES, apply_strategy, checkpoint_activations, trainable_parameters


PRECISIONS = ("bf16", "pure-bf16", "float32")
OPTIMIZERS = ("adamw", "muon")
# nf4 with double quantization: 4 bits, one 8-bit scale for 64 weights, one float32 scale for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
PARTS = ("weights", "gradients", "optimizer", "activations", "communication")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device (rank) at the end of the forward pass, with all gradients there already.

    weights, gradients, optimizer: Of this rank; AdamW keeps two numbers for each weight that gets a gradient,
        Muon one for those in matrices.
    activations: Kept for the backward pass, copies of weights that autocast makes included.
    communication: DDP's gradient buckets, or the blocks FSDP has gathered at one time.
    parameters, trainable: Of all the model; `trainable` counts as the paper does, unused last tower blocks included.
    flops_per_sample: Forward and backward, without what gradient checkpointing computes again.
    """

    strategy: str
    batch_size: int
    world_size: int
    sharded: bool
    precision: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    parameters: int
    trainable: int
    flops_per_sample: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication

    def describe(self) -> str:
        """What learns and what memory it takes, a line each."""
        unit, size = memory_unit(self.total)
        parts = ", ".join(f"{name} {getattr(self, name) / size:.1f}" for name in PARTS if getattr(self, name))
        return (
            f"trains    {self.trainable / 1e6:.1f}M of {self.parameters / 1e6:.1f}M parameters\n"
            f"memory    {self.total / size:.1f} {unit} of one device in {self.precision}: {parts} "
            "(allocator and CUDA context come on top)"
        )


def estimate(
    config: OpenVLAConfig,
    strategy: str,
    *,
    batch_size: int = 16,
    world_size: int = 1,
    sharded: bool = False,
    gradient_checkpointing: bool = False,
    precision: str = "bf16",
    text_tokens: int | None = None,
    shape: tuple[int, int] | None = None,
    optimizer: str = "adamw",
    **options: Any,
) -> MemoryEstimate:
    """Plan a run of `strategy`; needs no weights and no more memory than the shapes.

    Args:
        batch_size: Samples of one rank.
        world_size: Ranks; with `sharded` (FSDP) they share weights, gradients and optimizer states, else (DDP) each has
            all of them.
        precision: `"bf16"`: computed in bfloat16; what learns is float32, what is frozen as it is published (bfloat16;
            for qlora 4 bits). `"pure-bf16"`: everything bfloat16, optimizer states included. `"float32"`: everything
            float32.
        text_tokens: Prompt and answer; image patches come on top. Default: a usual instruction with its answer.
        shape: (K, A) of the actions of a sample. Default: those of the model.
        optimizer: `"adamw"` or `"muon"`.
        options: Of the strategy, such as `rank`.

    Raises:
        ValueError: If the strategy, precision or optimizer is unknown, a number is not positive, or the text is no
            longer than the answer.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("precision", precision, PRECISIONS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    shape = usual_shape(config) if shape is None else shape
    text_tokens = usual_text(config, shape) if text_tokens is None else text_tokens
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("text_tokens", text_tokens, head_without_weights(config).num_targets(shape) + 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    sharded = sharded and world_size > 1
    # FSDP computes in bfloat16 itself, on gathered copies; without it autocast makes the copies.
    autocast = precision == "bf16" and not sharded
    compute = torch.bfloat16 if precision == "pure-bf16" or (precision == "bf16" and sharded) else None
    model = build(config, strategy, precision, **options)
    matrices = [
        optimizer == "muon" and is_orthogonalized(name, parameter.shape) for name, parameter in model.named_parameters()
    ]
    numbers = [_stored(name, parameter, strategy, precision) for name, parameter in model.named_parameters()]
    trainable = trainable_parameters(model)
    step = run_step(model, config, batch_size, text_tokens, shape, autocast=autocast, dtype=compute)
    activations = step.saved
    if gradient_checkpointing:
        again = build(config, strategy, precision, **options)
        checkpoint_activations(again)
        again.train()
        # Blocks are computed again one at a time: the largest has its activations back.
        kept = run_step(again, config, batch_size, text_tokens, shape, autocast=autocast, dtype=compute, backward=False)
        activations = kept.saved + step.largest_block

    ranks = world_size if sharded else 1
    weights = sum(size / (ranks if can_shard else 1) for size, can_shard in numbers)
    size = 2 if precision == "pure-bf16" else 4
    learning = [size * numel * gradient for numel, gradient in zip(step.numels, step.gradients)]
    states = [gradient * (1 if matrix else 2) for gradient, matrix in zip(learning, matrices)]
    communication = 0.0
    if sharded:
        # Two units at a time (the next is fetched ahead) in the type of the computation, one's complete gradient.
        size = 4 if precision == "float32" else 2
        communication = 2 * size * step.largest_unit + 4 * step.largest_learning_unit
    elif world_size > 1:
        communication = float(sum(learning))
    return MemoryEstimate(
        strategy=strategy,
        batch_size=batch_size,
        world_size=world_size,
        sharded=sharded,
        precision=precision,
        weights=weights,
        gradients=sum(learning) / ranks,
        optimizer=sum(states) / ranks,
        activations=activations,
        communication=communication,
        parameters=config_parameters(model),
        trainable=trainable,
        flops_per_sample=step.flops / batch_size,
    )


def build(config: OpenVLAConfig, strategy: str, precision: str = "bf16", **options: Any) -> Any:
    """The model of a strategy on the meta device, in the types it trains in (qlora: as if its base were bfloat16)."""
    with torch.device("meta"):
        model: Any = OpenVLAForActionPrediction(copy.deepcopy(config))
        if precision != "float32":
            model = model.to(torch.bfloat16)
        if strategy == "qlora":
            for name, parameter in model.named_parameters():
                if not _quantized(name, parameter):
                    parameter.data = parameter.data.float()  # as PEFT prepares a quantized model
        # A quantized base cannot be made on the meta device; its adapters are those of lora.
        added = list(model.added_parameters().values())
        model = apply_strategy(model, "lora" if strategy == "qlora" else strategy, **options)
        for parameter in added:
            parameter.requires_grad_(True)
        if precision == "bf16":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # as `finetune` loads it
    return model


def config_parameters(model: nn.Module) -> int:
    """Parameters of the model without adapters."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)


def _quantized(name: str, parameter: nn.Parameter) -> bool:
    """Whether `qlora` holds it in 4 bits: linear layers of the language model, output layer excepted."""
    excepted = "embed_tokens" in name or "lora_" in name or any(part in name for part in NOT_QUANTIZED)
    return parameter.ndim == 2 and not excepted


def _stored(name: str, parameter: nn.Parameter, strategy: str, precision: str) -> tuple[float, bool]:
    """Bytes of a parameter, and whether FSDP can share it out (accelerate leaves 4-bit weights unsharded)."""
    if strategy == "qlora" and _quantized(name, parameter):
        return parameter.numel() * NF4_BYTES, False
    return parameter.numel() * (2 if precision == "pure-bf16" else parameter.element_size()), True


# Table ---------------------------------------------------------------------------------------------------------------


def memory_unit(size: float) -> tuple[str, float]:
    """In what to print so many bytes, and the bytes of one such unit: GB are 10^9, MB 10^6."""
    return ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)


def table(estimates: list[MemoryEstimate]) -> str:
    """One line for each plan, a Markdown table of one device."""
    unit, size = memory_unit(max(plan.total for plan in estimates))
    header = ["strategy", "learn, M", *PARTS, f"total {unit}", "GFLOP/sample"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for plan in estimates:
        sizes = [*(getattr(plan, part) for part in PARTS), plan.total]
        cells = [plan.strategy, f"{plan.trainable / 1e6:.1f}", *(f"{part / size:.1f}" for part in sizes)]
        lines.append("| " + " | ".join([*cells, f"{plan.flops_per_sample / 1e9:,.1f}"]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m openvla.training.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a preset (openvla-7b, openvla-v01-7b), a folder or a Hub id")
    parser.add_argument(
        "--strategy",
        nargs="+",
        default=list(STRATEGIES),
        choices=list(STRATEGIES),
        help="strategies to plan; default: all",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="samples of one device in a step; default: %(default)s"
    )
    parser.add_argument("--world-size", type=int, default=1, help="devices; default: %(default)s")
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="weights, gradients and optimizer are shared out (FSDP) instead of repeated (DDP)",
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations again instead of keeping them"
    )
    parser.add_argument(
        "--precision", default="bf16", choices=PRECISIONS, help="type of the computation; default: %(default)s"
    )
    parser.add_argument(
        "--optimizer", default="adamw", choices=OPTIMIZERS, help="rule of the updates; default: %(default)s"
    )
    parser.add_argument(
        "--text-tokens", type=int, help="tokens of a prompt with its action; default: of a usual instruction"
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of adapters (lora, qlora); default: %(default)s")
    given = vars(parser.parse_args(argv))
    model, strategies, rank = given.pop("model"), given.pop("strategy"), given.pop("rank")
    ignore_library_warnings()
    plans = []
    try:
        if adapted := sorted({"lora", "qlora"} & set(strategies)):
            require("peft", purpose=f"strategy '{adapted[0]}'", preferred="train")
        preset = model in preset_names()
        if not preset and "/" not in model and not os.path.exists(model):
            check_choice("model", model, preset_names(), "Or a folder, or a Hub id such as openvla/openvla-7b.")
        config = load_preset_config(model) if preset else OpenVLAConfig.from_pretrained(model)
        for strategy in strategies:
            adapter = {"rank": rank} if strategy in ("lora", "qlora") else {}
            plans.append(estimate(config, strategy, **given, **adapter))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    print(table(plans))


if __name__ == "__main__":
    main()

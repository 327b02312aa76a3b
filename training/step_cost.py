"""One training step on tensors that have shapes and types but no values (torch's FakeTensorMode): what it keeps for the
backward pass and multiplies is counted, not guessed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..action_heads_openvla import head_without_weights
from ..configuration_openvla import OpenVLAConfig
from ..patches_openvla import IGNORE_INDEX
from .strategies import decoder_blocks


ACTION_SHAPE = (1, 7)  # (K, A) where no data says otherwise
TEXT_TOKENS = 30  # prompt and answer of a usual instruction, where the answer is ACTION_SHAPE


@dataclass
class Step:
    """What one training step showed; see `run_step`."""

    saved: int
    largest_block: int
    flops: int
    numels: list[int]
    gradients: list[bool]
    largest_unit: int
    largest_learning_unit: int


def usual_shape(config: OpenVLAConfig) -> tuple[int, int]:
    """(K, A) of a model's actions, where no data says: by its head or its statistics, if they agree."""
    known = [(entry.get("action") or {}).get("q01") or () for entry in (config.norm_stats or {}).values()]
    sizes = {config.action_dim} if config.action_dim is not None else {len(values) for values in known if values}
    return config.action_chunk, sizes.pop() if len(sizes) == 1 else ACTION_SHAPE[1]


def usual_text(config: OpenVLAConfig, shape: tuple[int, int]) -> int:
    """Tokens of a usual prompt with an answer of this shape."""
    head = head_without_weights(config)
    return TEXT_TOKENS + head.num_targets(shape) - head.num_targets(ACTION_SHAPE)


class SavedBytes:
    """Counts the storages autograd keeps for the backward pass, each once, those of the model itself not at all."""

    def __init__(self, model: nn.Module):
        own = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes a second time

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextmanager
    def count(self) -> Iterator[None]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def training_inputs(
    config: OpenVLAConfig, batch_size: int, text_tokens: int, shape: tuple[int, int] = ACTION_SHAPE
) -> dict[str, torch.Tensor]:
    """A batch as `ActionCollator` makes it: token ids, labels and bool mask (batch, text_tokens), images (batch,
    3 * towers, height, width). Labels are -100 but for the answer.

    What the mask says stays unknown in a step without values: attention then takes it as one with padding, which it is
    in most batches.
    """
    ids = torch.ones(batch_size, text_tokens, dtype=torch.long)
    labels = ids.clone()
    head = head_without_weights(config)
    labels[:, : -head.num_targets(shape)] = IGNORE_INDEX
    size = config.image_sizes[0]
    pixels = torch.zeros(batch_size, len(config.camera_names) * 3 * len(config.image_sizes), size, size)
    state = {} if config.proprio_dim is None else {"proprio": torch.zeros(batch_size, config.proprio_dim)}
    actions = {"actions": torch.zeros(batch_size, *shape)} if head.wants_actions else {}
    inputs = {"input_ids": ids, "attention_mask": ids.bool(), "labels": labels, "pixel_values": pixels}
    return {**inputs, **state, **actions}


def run_step(
    model: Any,
    config: OpenVLAConfig,
    batch_size: int,
    text_tokens: int,
    shape: tuple[int, int] = ACTION_SHAPE,
    *,
    autocast: bool = False,
    dtype: torch.dtype | None = None,
    backward: bool = True,
) -> Step:
    """Forward and backward of a model on the meta device, on tensors without values.

    Args:
        autocast: Compute in bfloat16 as `TrainingArguments(bf16=True)` does.
        dtype: Cast the model first.
    """
    if dtype is not None:
        model = model.to(dtype)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.action_head
    base._placeholders = lambda input_ids, inputs_embeds: None  # a text with room for them is looked at, for its values
    batch = head.prepare(training_inputs(config, batch_size, text_tokens, shape))  # looks at values
    # Tensors of the CPU and not of the meta device: autocast knows no meta tensors.
    with FakeTensorMode() as fake, FlopCounterMode(display=False) as counter:
        batch = {name: fake.from_tensor(value) if torch.is_tensor(value) else value for name, value in batch.items()}
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        saved = SavedBytes(model)
        blocks = _BlockBytes(model, saved)
        with saved.count(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = head.loss(model, batch)
        blocks.remove()
        if backward:
            loss.backward()
    parameters = list(model.parameters())
    units = fsdp_units(model)
    return Step(
        saved=saved.total,
        largest_block=blocks.largest,
        flops=counter.get_total_flops(),
        numels=[parameter.numel() for parameter in parameters],
        gradients=[parameter.grad is not None for parameter in parameters],
        largest_unit=max(sum(parameter.numel() for parameter in unit) for unit in units),
        largest_learning_unit=max(
            sum(parameter.numel() for parameter in unit if parameter.requires_grad) for unit in units
        ),
    )


class _BlockBytes:
    """The most that one block of towers or language model adds to what is kept."""

    def __init__(self, model: Any, saved: SavedBytes):
        self.largest = 0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        blocks = [
            *decoder_blocks(base),
            *(block for tower in base.vision_backbone.towers for block in tower.blocks),
        ]
        before: dict[nn.Module, int] = {}

        def enter(block, *_):
            before[block] = saved.total

        def leave(block, *_):
            self.largest = max(self.largest, saved.total - before[block])

        self._handles = [block.register_forward_pre_hook(enter) for block in blocks]
        self._handles += [block.register_forward_hook(leave) for block in blocks]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def fsdp_units(model: Any) -> list[list[nn.Parameter]]:
    """Parameters that FSDP gathers together: modules the model does not split, embeddings, output layer, the rest."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules) | set(getattr(base.get_decoder(), "_no_split_modules", None) or ())
    whole = [module for module in base.modules() if type(module).__name__ in names]
    whole += [base.get_input_embeddings(), base.get_output_embeddings()]
    units = [list(module.parameters()) for module in whole]
    taken = {id(parameter) for unit in units for parameter in unit}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return [unit for unit in (*units, rest) if unit]

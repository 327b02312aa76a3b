"""Recordings of what a model computes on a CUDA device: what they read, and which model that was."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .inputs_openvla import ModelInputs
from .llama_openvla import any_global_hooks, calls_of_llama, has_hooks
from .modules_openvla import modules_of


class CudaGraph:
    """A recording of what a function does on the device; its `output` is written again by each `replay`.

    Args:
        stream: Of graphs that are let go of together. A graph that ends takes with it the working memory of cuBLAS of
            its stream, which others recorded there still use (pytorch#193402): torch's default is one stream for all.
    """

    def __init__(self, function: Callable[[], torch.Tensor], stream: Any):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels and take their memory
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.output = function()
        self.replay()  # what other graphs read is there when they are recorded

    def replay(self) -> None:
        self.graph.replay()


class Recorded:
    """Graphs of one batch size and length of prompts, and the memory that they read. One prediction at a time has it.

    Args:
        model: An `OpenVLAForActionPrediction` on a CUDA device.
        batch, length: Of the prompts, padded; see the class that records them.
        num_tokens: Of an answer.
    """

    record: type = CudaGraph

    def __init__(self, model: Any, batch: int, length: int, num_tokens: int):
        self.lock = threading.Lock()
        self.batch, self.length, self.num_tokens = batch, length, num_tokens
        device, config = model.device, model.config
        channels, *size = model.vision_backbone.input_shape
        self.pixels = torch.zeros(batch, len(model.camera_names) * channels, *size, device=device)
        self.proprio = None if config.proprio_dim is None else torch.zeros(batch, config.proprio_dim, device=device)
        self.input_ids, self.attention_mask = torch.zeros(2, batch, length, dtype=torch.long, device=device).unbind()
        self.attention_mask.fill_(1)
        # torch frees the working memory of a stream with the first of its graphs that ends (`CudaGraph`): own ones.
        self.stream, self.beside = (torch.cuda.Stream() if device.type == "cuda" else None for _ in range(2))

    def take(self, inputs: ModelInputs) -> None:
        """Images and states of a prediction."""
        self.pixels.copy_(inputs.pixel_values, non_blocking=True)
        if self.proprio is not None and inputs.proprio is not None:
            self.proprio.copy_(inputs.proprio, non_blocking=True)


class Snapshot:
    """What graphs of a model compute with: which modules, and where their tensors are. Values may change in place."""

    def __init__(self, model: Any):
        self.modules = modules_of(model)
        self.read = _read(model)
        # A recording neither calls hooks nor sees another `forward`. The model itself is not called.
        self.called = self.modules.below
        self.hooks = [hooks for part in self.called for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.replaced = _replaced(self.modules.attributes)
        modules = [model, *self.called]
        self.tensors = [held for module in modules for held in (module._parameters, module._buffers) if held]
        self.places = _places(self.tensors)  # others wherever a tensor is cast or moved
        self.adapters = [
            (module, _adapter(module)) for module in modules if getattr(module, "merged_adapters", None) is not None
        ]

    def is_of(self, model: Any) -> bool:
        """Whether graphs would still compute with what the model has. It is asked before every prediction."""
        return (
            self.modules.are_those()
            and _read(model) == self.read
            and not (any(self.hooks) and any(map(has_hooks, self.called)))
            and not any_global_hooks()
            and _replaced(self.modules.attributes) == self.replaced
            and _places(self.tensors) == self.places
            and all(_adapter(module) == state for module, state in self.adapters)
        )


def _read(model: Any) -> tuple[Any, ...]:
    """Of the configuration, what own passes ask for; of the library, what it calls by name."""
    config = model.language_model.config
    return config._attn_implementation, config.num_hidden_layers, calls_of_llama()


def _replaced(modules: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What calls of modules do in place of the forward of their class, from the attributes of each."""
    compiled = [attributes.get("_compiled_call_impl") for attributes in modules]
    return [attributes.get("forward") for attributes in modules] + compiled


def _places(tensors: Sequence[Mapping[str, torch.Tensor | None]]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for held in tensors for tensor in held.values()]


def _adapter(layer: Any) -> tuple[Any, ...]:
    """What a layer of PEFT adds to its weights."""
    scaling = getattr(layer, "scaling", None)
    return (
        list(layer.merged_adapters),
        getattr(layer, "disable_adapters", None),
        str(layer.active_adapters),
        str(scaling) if isinstance(scaling, dict) else "",
    )


__all__ = ["CudaGraph", "Recorded", "Snapshot"]

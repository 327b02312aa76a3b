"""Where the steps of a prediction come from; on a CUDA device, after `prepare_for_inference`, from graphs.

A graph is a recording of kernels that starts all of them at once: without it a GPU waits for Python most of the time.
One computes a whole answer. Two are for drafts and samples: one reads images, prompts and guesses of all tokens; the
other reads all tokens of the answer once more. Each serves one batch size and prompts up to one length,
which are padded to it. Whatever no graph was made for is computed as ever, and so is everything once the model is not
the one that was recorded.

Shapes: `batch` samples, `length` tokens and patches of a padded prompt.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from .compiled_openvla import CompiledSteps, compiling, why_not_compiled
from .decoding_openvla import EagerSteps, Prefix, Steps
from .inputs_openvla import ModelInputs
from .llama_openvla import LlamaSteps, any_global_hooks, cache_shape, has_hooks, is_plain_llama, open_steps, pool_of
from .modules_openvla import modules_of
from .sampling_openvla import Choice, check_flags
from .stages_openvla import stage
from .vision_openvla import towers_beside


TokenRange = tuple[int, int | None]


@dataclass(frozen=True)
class Preparation:
    """What `prepare_for_inference` did.

    seconds: How long it took.
    graphs: (batch, prompt tokens) that have graphs; empty where none are used.
    reason: Why there are none, or why they are not compiled.
    compiled: Whether their kernels are those of `torch.compile`.
    """

    seconds: float
    graphs: list[tuple[int, int]] = field(default_factory=list)
    reason: str = ""
    compiled: bool = False


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


class GraphSteps(Steps):
    """Steps of one batch size and length of prompts, in memory of their own. One prediction at a time has them.

    Args:
        model: An `OpenVLAForActionPrediction` on a CUDA device, whose language model is a plain Llama.
        batch, tokens: Samples, and tokens of their padded prompts without patches.
        num_tokens: Of an answer.
        make_steps: `LlamaSteps`, or such whose kernels are compiled.
    """

    verifies = True
    record: type = CudaGraph

    def __init__(
        self,
        model: Any,
        batch: int,
        tokens: int,
        num_tokens: int,
        token_range: TokenRange,
        make_steps: type[LlamaSteps] = LlamaSteps,
    ):
        self.lock = threading.Lock()
        self.batch, self.length, self.num_tokens = batch, tokens + model.num_patches, num_tokens
        device, config = model.device, model.config
        long = {"dtype": torch.long, "device": device}
        channels, *size = model.vision_backbone.input_shape
        self.pixels = torch.zeros(batch, len(model.camera_names) * channels, *size, device=device)
        self.proprio = None if config.proprio_dim is None else torch.zeros(batch, config.proprio_dim, device=device)
        self.input_ids, self.attention_mask = torch.zeros(2, batch, self.length, **long).unbind()
        self.attention_mask.fill_(1)
        self.places = torch.arange(1, 1 + model.num_patches, **long).repeat(batch, 1)  # of the patches
        self.answers = torch.zeros(batch, max(num_tokens - 1, 1), **long)
        self.finite = torch.ones(batch, 1, dtype=torch.bool, device=device)
        dtype = model.get_input_embeddings().weight.dtype
        cache = torch.zeros(
            cache_shape(model.language_model, batch, self.length + num_tokens), dtype=dtype, device=device
        )
        # torch frees the working memory of a stream with the first of its graphs that ends (`CudaGraph`): own ones.
        stream, beside = (torch.cuda.Stream() if device.type == "cuda" else None for _ in range(2))

        def read_inputs() -> LlamaSteps:
            with towers_beside(beside):
                features = model._encode(self.pixels, self.proprio)
            embeds = model.get_input_embeddings()(self.input_ids)
            places = self.places[..., None].expand(-1, -1, embeds.shape[2])
            embeds = embeds.scatter(1, places, features.to(embeds.dtype))
            self.finite.copy_(features.isfinite().flatten(1).all(dim=1, keepdim=True))
            # Behind the prompts: they are then read without a mask.
            prefix = Prefix(embeds, self.attention_mask, self.finite, pads_right=True)
            return make_steps(model.language_model, prefix, num_tokens, token_range, cache)

        graph_steps: list[LlamaSteps] = []

        def read_all() -> torch.Tensor:
            graph_steps[:] = [read_inputs()]
            return graph_steps[0].prefill(self.answers[:, : num_tokens - 1])

        def read_answers() -> torch.Tensor:
            return graph_steps[0].step(self.answers, 0)

        def answer() -> torch.Tensor:
            return read_inputs().answer(num_tokens, token_range[0])

        self.prefilling = self.record(read_all, stream)
        self.stepping = self.record(read_answers, stream) if num_tokens > 1 else None
        # Recordings know addresses and hold nothing: memory that is let go of here is given to other tensors, and both
        # write over each other.
        steps = graph_steps[0]
        self.held = (cache, steps.cos, steps.sin, steps.padding, steps.mask)
        self.answering = self.record(answer, stream) if num_tokens > 1 else self.prefilling

    def fill(
        self, inputs: ModelInputs, input_ids: torch.Tensor, mask: torch.Tensor | None, patches: np.ndarray
    ) -> None:
        """Take a prediction, (batch, n) and n up to `length`: ids with placeholders, and where these stand."""
        padding = torch.zeros(len(input_ids), 1, dtype=torch.long)
        if mask is not None:
            padding = (1 - mask).sum(dim=1, keepdim=True)
        place = torch.arange(self.length).expand(len(input_ids), -1)
        real = place < input_ids.shape[1] - padding
        ids = input_ids.gather(1, (place + padding).clamp(max=input_ids.shape[1] - 1))
        self.input_ids.copy_(ids, non_blocking=True)
        self.attention_mask.copy_(real.long(), non_blocking=True)
        self.places.copy_(torch.from_numpy(patches) - padding, non_blocking=True)
        self.pixels.copy_(inputs.pixel_values, non_blocking=True)
        if self.proprio is not None and inputs.proprio is not None:
            self.proprio.copy_(inputs.proprio, non_blocking=True)

    def prefill(self, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        count = 0 if token_ids is None else token_ids.shape[1]
        if token_ids is not None and count:
            self.answers[:, :count] = token_ids
        self.prefilling.replay()
        return self.prefilling.output[:, : 1 + count].clone()

    def step(self, token_ids: torch.Tensor, begin: int) -> torch.Tensor:
        assert self.stepping is not None  # there is more than one token
        self.answers[:, begin : begin + token_ids.shape[1]] = token_ids
        self.stepping.replay()
        return self.stepping.output[:, begin : begin + token_ids.shape[1]].clone()

    def answer(self, num_tokens: int, first: int) -> torch.Tensor:
        assert num_tokens == self.num_tokens  # `Prepared.find` looks at it, and at the tokens
        with stage("answer"):
            self.answering.replay()
        return self.answering.output.clone()


@dataclass
class Prepared:
    """Graphs of a model, and which model that was."""

    steps: list[GraphSteps]
    token_range: TokenRange
    snapshot: "Snapshot"
    warned: bool = False

    def find(self, model: Any, batch: int, length: int, num_tokens: int, token_range: TokenRange) -> GraphSteps | None:
        """Those for prompts of at most `length`, patches included; None where there are none that are up to date."""
        fits = [
            steps for steps in self.steps
            if steps.batch == batch and steps.num_tokens == num_tokens and steps.length >= length
        ]  # fmt: skip
        if not fits or token_range != self.token_range:
            return None
        if not self.snapshot.is_of(model):
            if not self.warned:
                self.warned = True
                warnings.warn(
                    "The model is not what prepare_for_inference recorded (moved, cast, another adapter, other "
                    "modules, or hooks on them): it predicts without graphs until it is prepared again.",
                    stacklevel=6,
                )
            return None
        return min(fits, key=lambda steps: steps.length)


_SLOW: ContextVar[str] = ContextVar("slow", default="")


@contextmanager
def _slow(way: str) -> Iterator[None]:
    before = _SLOW.set(way)
    try:
        yield
    finally:
        _SLOW.reset(before)


def plain_decoding() -> AbstractContextManager[None]:
    """Predictions of this thread by the library's own steps, one token after the other, drafts or not: what faster ones
    are compared with."""
    return _slow("plain")


def without_graphs() -> AbstractContextManager[None]:
    """Predictions of this thread as without `prepare_for_inference`."""
    return _slow("own")


_PREPARED: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()


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
    """Of the configuration, what own passes ask for."""
    config = model.language_model.config
    return config._attn_implementation, config.num_hidden_layers


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


@torch.inference_mode()
def prepare(
    model: Any, batch_sizes: Sequence[int], prompt_buckets: Sequence[int], num_tokens: int, compile: bool
) -> Preparation:
    """See `OpenVLAForActionPrediction.prepare_for_inference`."""
    for name, sizes in (("batch_sizes", batch_sizes), ("prompt_buckets", prompt_buckets)):
        whole = isinstance(sizes, (list, tuple, range)) and all(type(size) is int and size > 0 for size in sizes)
        if not whole or not sizes:
            raise ValueError(f"{name}={sizes!r}: expected whole numbers of at least 1, such as (1, 4).")
    check_flags(compile=compile)
    started = time.perf_counter()
    _PREPARED.pop(model, None)
    pairs = [(batch, tokens) for batch in sorted({*batch_sizes}) for tokens in sorted({*prompt_buckets})]
    reason = ""
    if not model.action_head.takes_drafts:
        reason = f"action_head='{model.config.action_head}' predicts in one pass"
    elif not is_plain_llama(model.language_model):
        reason = "the language model has the library's own steps"
    elif any(map(has_hooks, modules_of(model).below)):  # the model itself is not called
        reason = "hooks are registered on its modules, which graphs do not call"
    else:
        pool, longest = pool_of(model.language_model), max(prompt_buckets) + model.num_patches + num_tokens
        most = model.config.text_config.max_position_embeddings
        if longest > most:
            raise ValueError(
                f"prompt_buckets={tuple(prompt_buckets)}: with {model.num_patches} patches and {num_tokens} tokens of "
                f"an answer that is {longest} positions, and the language model has {most}."
            )
        shape = cache_shape(model.language_model, max(batch_sizes), longest)
        try:
            pool.give_back(pool.take(shape, model.get_input_embeddings().weight))
        except (MemoryError, RuntimeError) as error:  # torch raises the second one
            raise MemoryError(f"batch_sizes={tuple(batch_sizes)}: their memory cannot be had ({error}).") from error
        if model.device.type != "cuda" and GraphSteps.record is CudaGraph:
            reason = f"the model is on {model.device.type}: graphs are of CUDA devices"
    if reason:
        return Preparation(time.perf_counter() - started, [], reason)
    token_range = model.action_tokenizer.token_range
    if compile:
        reason = why_not_compiled(model.language_model)
    for make_steps in (CompiledSteps, LlamaSteps) if compile and not reason else (LlamaSteps,):
        try:
            with _on_device(model), compiling() if make_steps is CompiledSteps else nullcontext():
                steps = [GraphSteps(model, *pair, num_tokens, token_range, make_steps) for pair in pairs]
            _PREPARED[model] = Prepared(steps, token_range, Snapshot(model))
            for pair in pairs:
                check_prediction(model, *pair, num_tokens)
        except (RuntimeError, ImportError) as error:  # something waits for the device; no compiler is installed
            _PREPARED.pop(model, None)
            reason = f"it cannot be {'compiled' if make_steps is CompiledSteps else 'recorded'}: {error}"
        else:
            return Preparation(time.perf_counter() - started, pairs, reason, make_steps is CompiledSteps)
    return Preparation(time.perf_counter() - started, [], reason)


def check_prediction(model: Any, batch: int, tokens: int, num_tokens: int) -> None:
    """Raise a `RuntimeError` where graphs of a size give other probabilities than the model does without: it moves an
    arm. Of noise as an image; without a draft, with a right one and with a wrong one, which need different graphs."""
    shape, config = (model.action_chunk, num_tokens // model.action_chunk), model.config
    channels, *size = model.vision_backbone.input_shape
    noise = torch.randn(
        batch, len(model.camera_names) * channels, *size, generator=torch.Generator().manual_seed(tokens)
    )
    special = {config.image_token_id, config.empty_token_id, config.pad_token_id, config.text_config.eos_token_id}
    word = next(token for token in range(3, 10) if token not in special)
    words = [config.text_config.bos_token_id or 0, *[word] * max(1, tokens - 2)]  # and one that ends the prompt
    proprio = None if config.proprio_dim is None else torch.zeros(batch, config.proprio_dim)
    inputs = ModelInputs([words] * batch, noise, proprio)

    def predict(draft: list[list[int]] | None) -> tuple[np.ndarray, np.ndarray]:
        found = model.action_head.actions(model, inputs, shape, Choice(draft=draft, distributions=True))
        return found.token_ids.reshape(batch, num_tokens), found.token_distributions.reshape(batch, num_tokens, -1)

    try:
        with without_graphs():
            expected = predict(None)
            drafted = predict(expected[0].tolist())  # the same by kernels for other numbers of rows
    except ValueError as error:  # what is not finite
        raise RuntimeError(f"of noise there is nothing to compare ({error})") from error
    exact = all(parameter.dtype == torch.float32 for parameter in model.language_model.parameters())
    rounding = max(0.02 if exact else 0.2, 4 * moved(drafted, expected))
    first, end = model.action_tokenizer.token_range
    wrong = np.where(expected[0] == first, end - 1, first)
    for draft in (None, expected[0].tolist(), wrong.tolist()):
        if (share := moved(predict(draft), expected)) > rounding:
            raise RuntimeError(
                f"of {batch} sample(s) and {tokens} prompt tokens {share:.0%} of the probability went to other tokens"
            )


def moved(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> float:
    """The largest share of probability that went to other tokens, of tokens (batch, n) with distributions (batch, n,
    tokens), where all tokens before are the same."""
    same = (found[0] == expected[0]).cumprod(axis=1)
    told = np.concatenate([np.ones_like(same[:, :1]), same[:, :-1]], axis=1).astype(bool)
    return float(np.abs(found[1] - expected[1]).sum(axis=-1)[told].max() / 2)


def _on_device(model: Any) -> AbstractContextManager:
    return torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()


@contextmanager
def open_prediction(
    model: Any, inputs: ModelInputs, num_tokens: int, decided: Sequence[Sequence[int]], token_range: TokenRange
) -> Iterator[tuple[Steps, torch.Tensor]]:
    """Steps of a prediction, and (batch, 1) bool whether features are finite, which holds from the prefill on.

    Args:
        num_tokens: Of the complete answer.
        decided: Tokens of each sample that are not to be decoded any more.
    """
    count = num_tokens - (len(decided[0]) if decided else 0)
    layout = model.prompt_layout(inputs, num_tokens, decided)
    if _SLOW.get() == "plain":
        prefix = model.prefix(inputs, layout)
        yield EagerSteps(model.language_model, prefix, count, token_range), prefix.finite
        return
    prepared = None if _SLOW.get() else _PREPARED.get(model)
    batch, length = layout.input_ids.shape
    found = None if prepared is None else prepared.find(model, batch, length, count, token_range)
    if found is not None:
        with found.lock:
            found.fill(inputs, layout.input_ids, layout.attention_mask, layout.patches)
            yield found, found.finite
        return
    prefix = model.prefix(inputs, layout)
    with open_steps(model.language_model, prefix, count, token_range) as steps:
        yield steps, prefix.finite


__all__ = ["GraphSteps", "Preparation", "open_prediction", "plain_decoding", "prepare", "without_graphs"]

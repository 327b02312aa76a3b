"""Where the steps of a prediction come from; on a CUDA device, after `prepare_for_inference`, from graphs.

A graph is a recording of kernels that starts all of them at once: without it a GPU waits for Python most of the time.
One computes a whole answer. Two are for drafts and samples: one reads images, prompts and guesses of all tokens; the
other reads all tokens of the answer once more. Heads that predict in one pass have one for it. Each serves one batch
size and prompts up to one length, which are padded to it. Whatever no graph was made for is computed as ever, and so is
everything once the model is not the one that was recorded.

Shapes: `batch` samples, `length` tokens and patches of a padded prompt.
"""

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from .compiled_openvla import CompiledSteps, compiling, why_not_compiled
from .decoding_openvla import EagerSteps, Prefix, Steps, are_finite
from .inputs_openvla import ModelInputs, place_actions, place_patches
from .llama_openvla import LlamaSteps, cache_shape, has_hooks, is_plain_llama, open_steps, pool_of
from .modules_openvla import between_predictions, modules_of
from .parallel_graphs_openvla import RecordedSequence, SequenceGraph
from .parallel_openvla import ActionSequence
from .products_openvla import Linear, order_weight
from .recordings_openvla import CudaGraph, Recorded, Snapshot
from .sampling_openvla import check_flags
from .stages_openvla import stage
from .vision_openvla import PatchProjection, towers_beside


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


class GraphSteps(Recorded, Steps):
    """Steps of a plain Llama.

    Args:
        batch, tokens: Samples, and tokens of their padded prompts without patches.
        make_steps: `LlamaSteps`, or such whose kernels are compiled.
    """

    verifies = True

    def __init__(
        self,
        model: Any,
        batch: int,
        tokens: int,
        num_tokens: int,
        token_range: TokenRange,
        make_steps: type[LlamaSteps] = LlamaSteps,
    ):
        super().__init__(model, batch, tokens + model.num_patches, num_tokens)
        device = model.device
        long = {"dtype": torch.long, "device": device}
        self.places = torch.arange(1, 1 + model.num_patches, **long).repeat(batch, 1)  # of the patches
        self.answers = torch.zeros(batch, max(num_tokens - 1, 1), **long)
        self.finite = torch.ones(batch, 1, dtype=torch.bool, device=device)
        dtype = model.get_input_embeddings().weight.dtype
        cache = torch.zeros(
            cache_shape(model.language_model, batch, self.length + num_tokens), dtype=dtype, device=device
        )

        def read_inputs() -> LlamaSteps:
            with towers_beside(self.beside):
                features = model._encode(self.pixels, self.proprio)
            embeds = model.get_input_embeddings()(self.input_ids)
            places = self.places[..., None].expand(-1, -1, embeds.shape[2])
            embeds = embeds.scatter(1, places, features.to(embeds.dtype))
            self.finite.copy_(are_finite(features))
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

        self.prefilling = self.record(read_all, self.stream)
        self.stepping = self.record(read_answers, self.stream) if num_tokens > 1 else None
        # Recordings know addresses and hold nothing: memory that is let go of here is given to other tensors, and both
        # write over each other.
        steps = graph_steps[0]
        self.held = (cache, steps.cos, steps.sin, steps.padding, steps.mask)
        self.answering = self.record(answer, self.stream) if num_tokens > 1 else self.prefilling

    def fill(
        self, inputs: ModelInputs, input_ids: torch.Tensor, mask: torch.Tensor | None, patches: np.ndarray
    ) -> None:
        """Take a prediction, (batch, n) and n up to `length`: ids with placeholders, and where these stand."""
        padding = torch.zeros(len(input_ids), 1, dtype=torch.long, device="cpu")
        if mask is not None:
            padding = (1 - mask).sum(dim=1, keepdim=True)
        place = torch.arange(self.length, device="cpu").expand(len(input_ids), -1)
        real = place < input_ids.shape[1] - padding
        ids = input_ids.gather(1, (place + padding).clamp(max=input_ids.shape[1] - 1))
        self.input_ids.copy_(ids, non_blocking=True)
        self.attention_mask.copy_(real.long(), non_blocking=True)
        self.places.copy_(torch.from_numpy(patches) - padding, non_blocking=True)
        self.take(inputs)

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
    """Graphs of a model, and which model that was.

    token_range: Of what is chosen within them; None: they choose nothing.
    """

    graphs: Sequence[Recorded]
    token_range: TokenRange | None
    snapshot: Snapshot
    warned: bool = False

    def find(self, model: Any, batch: int, length: int, num_tokens: int, token_range: TokenRange | None) -> Any:
        """The smallest that prompts of `length` fit into; None where there are none that are up to date, and under
        autocast."""
        fits = [
            graphs for graphs in self.graphs
            if graphs.batch == batch and graphs.num_tokens == num_tokens and graphs.length >= length
        ]  # fmt: skip
        if not fits or token_range != self.token_range or torch.is_autocast_enabled(model.device.type):
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
        return min(fits, key=lambda graphs: graphs.length)


# Which steps predictions of this thread take: "graphs" where there are some, "own" (`open_steps`), or "library".
_STEPS: ContextVar[str] = ContextVar("steps", default="graphs")


@contextmanager
def _with_steps(kind: str) -> Iterator[None]:
    before = _STEPS.set(kind)
    try:
        yield
    finally:
        _STEPS.reset(before)


def plain_decoding() -> AbstractContextManager[None]:
    """Predictions of this thread by the library's own steps, one token after the other, drafts or not: what faster ones
    are compared with."""
    return _with_steps("library")


def without_graphs() -> AbstractContextManager[None]:
    """Predictions of this thread as without `prepare_for_inference`."""
    return _with_steps("own")


_PREPARED: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()


def order_weights(model: Any, own: int = 0, learns: bool = False) -> None:
    """Store the weights that every prediction multiplies with in the order that is fastest where they are now, or in
    that of a model that learns: see `order_weight`. Those that have another use stay as they are, tables of tokens, and
    those that another thread may be reading.

    Args:
        own: Predictions of `model` that the caller itself is in, see `between_predictions`.
    """
    modules, table = modules_of(model).below, model.get_output_embeddings()
    uses = Counter(id(one) for module in modules for one in module._parameters.values() if one is not None)
    for module in modules:
        if type(module) in (Linear, PatchProjection) and module is not table and uses[id(module.weight)] == 1:
            with between_predictions(model, own, module.weight) as nobody_reads:
                if nobody_reads:
                    order_weight(module, learns)
    model.weights_in_order = not learns  # a copy of the model knows it as well


def before_learning(model: Any) -> None:
    """Put the weights back where gradients are asked for, as `train()` does: scripts learn without it, and torch's
    fused optimizers take moments that were made before for those of other weights. Not where nothing learns, which
    predicts faster so; nor under graphs, which know where weights lie: on a GPU nothing was moved."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if model.weights_in_order and model not in _PREPARED and any(one.requires_grad for one in model.parameters()):
        order_weights(model, learns=True)


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
    order_weights(model, own=1)
    pairs = [(batch, tokens) for batch in sorted({*batch_sizes}) for tokens in sorted({*prompt_buckets})]
    reason, head = "", model.action_head
    if not (head.takes_drafts or head.one_pass):
        reason = f"action_head='{model.config.action_head}' predicts in passes of its own"
    elif head.takes_drafts and not is_plain_llama(model.language_model):
        reason = "the language model has the library's own steps"
    elif torch.is_autocast_enabled(model.device.type):  # a graph would read weights that autocast casts and lets go of
        reason = "autocast is on: cast the model in its place, model.to(dtype)"
    elif any(map(has_hooks, modules_of(model).below)):  # the model itself is not called
        reason = "hooks are registered on its modules, which graphs do not call"
    else:
        longest = max(prompt_buckets) + model.num_patches + num_tokens + head.one_pass  # the end follows the actions
        most = model.config.text_config.max_position_embeddings
        if longest > most:
            raise ValueError(
                f"prompt_buckets={tuple(prompt_buckets)}: with {model.num_patches} patches and {num_tokens} tokens of "
                f"an answer that is {longest} positions, and the language model has {most}."
            )
        if head.takes_drafts:
            take_cache(model, batch_sizes, longest)
        if model.device.type != "cuda" and (SequenceGraph if head.one_pass else GraphSteps).record is CudaGraph:
            reason = f"the model is on {model.device.type}: graphs are of CUDA devices"
    if reason:
        return Preparation(time.perf_counter() - started, [], reason)
    token_range = None if head.one_pass else model.action_tokenizer.token_range
    if compile:
        reason = "graphs of one pass are not compiled" if head.one_pass else why_not_compiled(model.language_model)
    for make_steps in (CompiledSteps, LlamaSteps) if compile and not reason else (LlamaSteps,):
        try:
            with _on_device(model), compiling() if make_steps is CompiledSteps else nullcontext():
                graphs: list[Recorded] = [
                    GraphSteps(model, *pair, num_tokens, token_range, make_steps)
                    if token_range
                    else SequenceGraph(model, *pair, num_tokens)
                    for pair in pairs
                ]
            _PREPARED[model] = Prepared(graphs, token_range, Snapshot(model))
            for pair in pairs:
                check_graphs(model, *pair, num_tokens)
        except (RuntimeError, ImportError) as error:  # something waits for the device; no compiler is installed
            _PREPARED.pop(model, None)
            reason = f"it cannot be {'compiled' if make_steps is CompiledSteps else 'recorded'}: {error}"
        else:
            return Preparation(time.perf_counter() - started, pairs, reason, make_steps is CompiledSteps)
    return Preparation(time.perf_counter() - started, [], reason)


def take_cache(model: Any, batch_sizes: Sequence[int], longest: int) -> None:
    """Let a model have a cache for its largest predictions. Raises a `MemoryError`."""
    pool, shape = pool_of(model.language_model), cache_shape(model.language_model, max(batch_sizes), longest)
    try:
        pool.give_back(pool.take(shape, model.get_input_embeddings().weight))
    except (MemoryError, RuntimeError) as error:  # torch raises the second one
        raise MemoryError(f"batch_sizes={tuple(batch_sizes)}: their memory cannot be had ({error}).") from error


def inputs_of_noise(model: Any, batch: int, tokens: int) -> ModelInputs:
    """Prompts of `tokens`, with the one that will end them, and noise as images."""
    config, (channels, *size) = model.config, model.vision_backbone.input_shape
    shape = (batch, len(model.camera_names) * channels, *size)
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(tokens), device="cpu")
    special = {config.image_token_id, config.empty_token_id, config.pad_token_id, config.text_config.eos_token_id}
    word = next(token for token in range(3, 10) if token not in special)
    words = [config.text_config.bos_token_id or 0, *[word] * max(1, tokens - 2)]
    proprio = None if config.proprio_dim is None else torch.zeros(batch, config.proprio_dim, device="cpu")
    return ModelInputs([words] * batch, noise, proprio)


def check_graphs(model: Any, batch: int, tokens: int, num_tokens: int) -> None:
    """Raise a `RuntimeError` where graphs of a size give other actions than the model does without: it moves an arm. Of
    noise as an image."""
    shape, inputs = (model.action_chunk, num_tokens // model.action_chunk), inputs_of_noise(model, batch, tokens)
    exact = all(parameter.dtype == torch.float32 for parameter in model.language_model.parameters())
    try:
        difference = model.action_head.difference_of_graphs(model, inputs, shape, 0.02 if exact else 0.2)
    except ValueError as error:  # what is not finite
        raise RuntimeError(f"of noise there is nothing to compare ({error})") from error
    if difference is not None:
        raise RuntimeError(f"of {batch} sample(s) and {tokens} prompt tokens {difference}")


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
    layout = place_patches(inputs.prompts, model.config, model.num_patches, num_tokens, decided)
    if _STEPS.get() == "library":
        prefix = model.prefix(inputs, layout)
        yield EagerSteps(model.language_model, prefix, count, token_range), prefix.finite
        return
    prepared = _PREPARED.get(model) if _STEPS.get() == "graphs" else None
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


def open_sequence(
    model: Any, inputs: ModelInputs, num_actions: int, decided: Sequence[Sequence[int]] = ()
) -> ActionSequence | RecordedSequence:
    """The sequence of a head that predicts in one pass; see `OpenVLAForActionPrediction.action_sequence`."""
    prepared = _PREPARED.get(model) if _STEPS.get() == "graphs" and not any(decided) else None
    if prepared is not None:
        placed = place_actions(inputs.prompts, model.config, model.num_patches, num_actions)
        batch, length = placed[0].shape
        graph = prepared.find(model, batch, length, num_actions, None)
        if graph is not None:
            return RecordedSequence(graph, inputs, *placed)
    return model.action_sequence(inputs, num_actions, decided)


__all__ = [
    "GraphSteps",
    "Preparation",
    "before_learning",
    "open_prediction",
    "open_sequence",
    "order_weights",
    "plain_decoding",
    "prepare",
    "without_graphs",
]

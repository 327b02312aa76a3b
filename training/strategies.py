"""The fine-tuning strategies of the paper (arXiv 2406.09246, table 1), and LoRA on a 4-bit base.

Each strategy is a function `(model, **options) -> model` that decides which parameters learn; a new one is a function
more with `@strategy`.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from ..adapters_openvla import adapter_names
from ..choices_openvla import check_choice
from ..parts_openvla import is_added
from ..quantization_openvla import LEAST_SHARE, NOT_QUANTIZED, has_quantized_layers
from ..quantized_linear_openvla import is_rounded
from ..vision_openvla import TOWERS


ADAPTED = (nn.Linear, nn.Conv2d, Conv1D)  # the last is the linear layer of GPT-2
STRATEGIES: dict[str, Callable[..., nn.Module]] = {}


def strategy(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a strategy under the name of its function."""
    STRATEGIES[function.__name__] = function
    return function


def apply_strategy(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Make the parameters of a strategy trainable and freeze all others.

    Args:
        model: An `OpenVLAForActionPrediction`.
        name: One of `STRATEGIES`: full, last_layer, frozen_vision, sandwich, lora, qlora.
        options: Of the strategy: `rank`, `alpha`, `dropout`, `targets`, `adapter` for lora and qlora.

    Returns:
        The model itself, or for lora and qlora the `PeftModel` around it.

    Raises:
        ValueError: If the strategy is unknown, or does not fit the model.
    """
    check_choice("strategy", name, STRATEGIES)
    return STRATEGIES[name](model, **options)


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def checkpoint_activations(model: Any) -> None:
    """Compute activations again in the backward pass instead of keeping them: less memory, slower."""
    # The newer name came with transformers 5.23; from 6 on it is the only one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def freeze_unused(model: Any) -> None:
    """Freeze what no forward pass reads, so that every parameter that learns has a gradient: of each vision tower the
    last block, the final norm and the pooling, which the published files hold nevertheless; the output layer, where the
    head gives numbers and no tokens. Sharded optimizers and DDP need this. Counts of the paper's table 1 include them:
    count before."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.action_head.wants_actions:
        shared = {id(parameter) for parameter in base.get_input_embeddings().parameters()}
        for parameter in base.get_output_embeddings().parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)
    for tower in model.modules():
        if not isinstance(tower, TOWERS):
            continue
        blocks = (f"blocks.{index}." for index in range(len(tower.blocks) - 1))
        used = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "rope.", "norm_pre.", *blocks)
        for name, parameter in tower.named_parameters():
            if not name.startswith(used):
                parameter.requires_grad_(False)


def _train_only(model: nn.Module, *parts: nn.Module) -> nn.Module:
    if any(map(is_rounded, model.parameters())):
        raise ValueError(
            "The weights are quantized and cannot learn themselves: use strategy 'qlora', or load them without "
            "quantization."
        )
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return model


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Blocks of the language model, in order; a `ValueError` where they have a name that is not known."""
    return _part(model.get_decoder(), ("layers", "h", "blocks"))


def _part(decoder: nn.Module, names: tuple[str, ...]) -> Any:
    """The part of a decoder of the library that has one of these names, by family."""
    found = (getattr(decoder, name, None) for name in names)
    if (part := next((part for part in found if part is not None), None)) is None:
        raise ValueError(
            f"This language model ({type(decoder).__name__}) has no {' or '.join(names)}: its last layer is not found. "
            "Take another strategy (full, frozen_vision, lora)."
        )
    return part


def _last_layer(model: Any) -> list[nn.Module]:
    """Last block, final norm, embeddings and output layer of the language model."""
    names = ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "final_norm", "ln_f", "norm_f")
    norm = _part(model.get_decoder(), names)
    return [model.get_input_embeddings(), decoder_blocks(model)[-1], norm, model.get_output_embeddings()]


@strategy
def full(model: Any) -> nn.Module:
    """Everything learns."""
    return _train_only(model, model)


@strategy
def last_layer(model: Any) -> nn.Module:
    """Last block, final norm, embeddings and output layer of the language model."""
    return _train_only(model, *_last_layer(model))


@strategy
def frozen_vision(model: Any) -> nn.Module:
    """Everything but the vision towers."""
    return _train_only(model, model.projector, model.language_model)


@strategy
def sandwich(model: Any) -> nn.Module:
    """Vision towers, projector, and what `last_layer` trains."""
    return _train_only(model, model.vision_backbone, model.projector, *_last_layer(model))


@strategy
def lora(
    model: Any,
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: str | list[str] | None = None,
    adapter: str | os.PathLike | None = None,
) -> nn.Module:
    """Low-rank adapters with the published defaults: on every linear layer, output layer and patch embedding included,
    gaussian initialization.

    Args:
        rank: Inner dimension of an adapter.
        alpha: Numerator of its scale `alpha / rank`. Default: `min(rank, 16)`.
        dropout: On the input of an adapter.
        targets: Names of modules as PEFT takes them. Default: all linear layers and patch embeddings.
        adapter: Folder of an adapter of this base that continues learning, instead of a new one.

    Raises:
        ValueError: If `rank` is below 1, or `adapter` is no LoRA, has another rank, alpha or dropout, or lacks weights.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"rank={rank}: an adapter needs at least 1.")
    if has_quantized_layers(model):
        raise ValueError(
            "The model has weights of few bits (`openvla quantize`), to which no adapter can be added: train on the "
            "model that it was made of, with strategy 'qlora' where memory is short."
        )
    if adapter is not None:
        config: Any = LoraConfig.from_pretrained(adapter)  # of the kind that the folder names
        if config.peft_type != "LORA":
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"The adapter in '{adapter}' is one of {kind}, and lora and qlora continue LORA alone: merge it first "
                "(`openvla merge`) and begin a new one on the result."
            )
        has = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        asked = {"rank": rank, "alpha": min(rank, 16) if alpha is None else alpha, "dropout": dropout}
        if has != asked:
            given, kept = (", ".join(f"{name} {value}" for name, value in each.items()) for each in (asked, has))
            raise ValueError(
                f"The adapter in '{adapter}' goes on learning as it is ({kept}), which is not what was asked for "
                f"({given}): give these, or merge it first (`openvla merge`) and begin a new one on the result."
            )
        return load_adapter(model, adapter, is_trainable=True)
    if targets is None:
        # Not PEFT's "all-linear", which leaves out the output layer. The convolution of the patch embedding is among
        # them: the original chose modules by the last part of their names, and "proj" is that of both.
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, ADAPTED) and not is_added(f"{name}.weight")  # those learn themselves
        ]
        _warn_of_few(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16) if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    return get_peft_model(model, config)


def _warn_of_few(model: Any, targets: list[str]) -> None:
    """Say where the smaller part of the language model's weights gets adapters."""
    decoder, layers = model.get_decoder(), dict(model.named_modules())
    adapted = {id(layers[name].weight) for name in targets}
    matrices = [
        weight
        for module in decoder.modules()
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1 and not isinstance(module, nn.Embedding)
    ]
    share = sum(weight.numel() for weight in matrices if id(weight) in adapted) / sum(map(torch.numel, matrices))
    if share < LEAST_SHARE:
        warnings.warn(
            f"{share:.0%} of the language model's weights get adapters, all others stay as they are: "
            f"{type(decoder).__name__} keeps them elsewhere than in linear layers (experts in one tensor).",
            stacklevel=4,
        )


def load_adapter(model: Any, adapter: str | os.PathLike, **options: Any) -> Any:
    """The `PeftModel` of a model and an adapter that was trained on it, whatever parts were added to the model since:
    its configuration may name modules by their ends ("fc1"), which a head or a projector of states has as well.

    Args:
        options: Of `PeftModel.from_pretrained`.

    Raises:
        ValueError: If modules that its configuration names have no weights in it: they would learn from nothing.
    """
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig.from_pretrained(adapter)
    names = adapter_names(adapter, {})
    if names is not None:
        modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names if ".lora_" in name}
        named = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (*ADAPTED, nn.Embedding))
            and not is_added(f"{name}.weight")
            and check_target_module_exists(config, name)
        ]
        if missing := [name for name in named if name not in modules]:
            raise ValueError(
                f"The weights of the adapter in '{adapter}' are not those of its adapter_config.json: of "
                f"{len(missing)} of {len(named)} modules there are none ({', '.join(missing[:3])}). Is it an adapter "
                "of another base, or was it cut off? Copy it again."
            )
        config.target_modules = modules or config.target_modules
    return PeftModel.from_pretrained(model, adapter, config=config, **options)


def merge_into_base(model: Any) -> Any:
    """The base of a `PeftModel` with its adapter in the weights. An output layer that is one with the embeddings, of
    which one has the adapter, gets weights of its own: PEFT would change both."""
    base = model.get_base_model()
    ends = [base.get_output_embeddings(), base.get_input_embeddings()]
    output, embeddings = (getattr(layer, "base_layer", layer) for layer in ends)
    if output.weight is embeddings.weight and any(hasattr(layer, "base_layer") for layer in ends):
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = False
    return model.merge_and_unload()


def qlora_quantization(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """How the base of `qlora` is loaded: `from_pretrained(..., quantization_config=qlora_quantization())`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


@strategy
def qlora(model: Any, **options: Any) -> nn.Module:
    """`lora` on a base whose language model is quantized to 4 bits (see `qlora_quantization`)."""
    from peft import prepare_model_for_kbit_training

    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            "qlora needs a 4-bit base: load the model with from_pretrained(..., "
            "quantization_config=openvla.training.qlora_quantization())."
        )
    return lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), **options)

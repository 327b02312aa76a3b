"""Quantized loading: ours of 8 bits, 4 bits and fp8, what stays unquantized, the original's keywords, and workarounds
for bitsandbytes."""

import logging
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import AutoQuantizationConfig, HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .choices_openvla import closest
from .float8_linear_openvla import Float8Linear
from .int4_linear_openvla import Int4Linear
from .int8_linear_openvla import Int8Linear
from .products_openvla import LINEAR, Linear
from .quantized_linear_openvla import QuantizedLinear, is_rounded


LINEARS: dict[int | str, type[QuantizedLinear]] = {8: Int8Linear, 4: Int4Linear, "fp8": Float8Linear}
METHOD = "openvla"  # `quant_method` of config.json
BNB = "bitsandbytes"
KNOWN_METHODS = (METHOD, BNB)
LEAST_SHARE = 0.5  # of the weights outside of exceptions; a model with fewer rounded is quantized in name only
# "projector" is part of the names of those of state and noisy actions too.
NOT_QUANTIZED = [
    "vision_backbone",
    "projector",
    "lm_head",
    "embed_out",  # its name in GPT-NeoX's files, and of its module in transformers 5.4
    "action_head",
    "proprio_projector",
    "noisy_action_projector",
]
# Token heads read single rows of lm_head; the type of the others is that of what they are given.
NEVER_QUANTIZED = [name for name in NOT_QUANTIZED if name not in ("vision_backbone", "projector")]


def take_quantization(kwargs: dict[str, Any]) -> None:
    """Leave in the arguments of `from_pretrained` one `quantization_config`, or none.

    `load_in_8bit` and `load_in_4bit` (the original's evaluation always passes both) and options that begin with
    `bnb_4bit_` or `llm_int8_` are those of transformers 4. Towers, projector and lm_head are excepted, unless the
    config names exceptions itself.

    Raises:
        ValueError: If both are asked for, or one beside a `quantization_config`, or that is none.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    # Not by the library's decorators, which refuse a second copy of this file: that of a Hub folder's own code.
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = OpenVLAQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = OpenVLAQuantizer
    asked = [name for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, False)]
    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("bnb_4bit_", "llm_int8_"))}
    given = kwargs.get("quantization_config")
    if len(asked) > 1 or (asked and given is not None):
        raise ValueError(
            f"{' and '.join(f'{name}=True' for name in asked)}{' beside a quantization_config' if given else ''}: a "
            "model is quantized in one way, give one of them."
        )
    if asked:
        given = BitsAndBytesConfig(**{asked[0]: True}, **options)
    if isinstance(given, dict):
        given = AutoQuantizationConfig.from_dict(given)
    if given is not None and not isinstance(given, QuantizationConfigMixin):
        raise ValueError(
            f"quantization_config={given!r}: expected a config such as BitsAndBytesConfig, or its fields, such as "
            f"{{'quant_method': '{METHOD}', 'bits': 8}}."
        )
    if given is not None:
        kwargs["quantization_config"] = _keep_out(given)


def _is_news(record: logging.LogRecord) -> bool:
    """bitsandbytes 0.50 says at every int8 layer of every token that it computes in float16, as int8 always does."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _keep_out(quantization_config):
    """The same config with towers, projector and lm_head excepted, unless it names exceptions itself."""
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization_config, name) and getattr(quantization_config, name) is None:
            quantization_config = type(quantization_config).from_dict(quantization_config.to_dict())
            setattr(quantization_config, name, list(NOT_QUANTIZED))
    return quantization_config


# Ours -----------------------------------------------------------------------------------------------------------------


class OpenVLAQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a model of 8 or 4 bits: given to `from_pretrained` it rounds the weights while they are
    read, and in config.json it says that they are stored so (`openvla quantize`).

    Args:
        bits: 8: the fast ones on a CPU, where activations have 8 bits as well. 4: the small ones. "fp8": floats of 8
            bits, fast on a GPU that multiplies them.
        modules_to_not_convert: Parts that stay as they are. Default: towers, projectors, heads and lm_head; the last
            two stay in any case.

    Raises:
        ValueError: If `bits` is something else, or parts are no list of names.
    """

    def __init__(self, bits: int | str = 8, modules_to_not_convert: list[str] | None = None, **unknown: Any):
        if type(bits) not in (int, str) or bits not in LINEARS:
            raise ValueError(f"bits={bits!r}: expected one of {', '.join(map(repr, LINEARS))}.")
        parts = modules_to_not_convert
        if parts is not None and not (
            isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts)
        ):
            raise ValueError(f"modules_to_not_convert={parts!r}: expected a list of names, such as ['lm_head'].")
        unknown.pop("quant_method", None)
        if unknown:
            raise ValueError(
                f"quantization_config holds {', '.join(unknown)}, which this version of openvla does not know: it was "
                "written by a later one, or changed."
            )
        self.quant_method = METHOD
        self.bits = bits
        self.modules_to_not_convert = modules_to_not_convert


def linears_to_quantize(model: nn.Module, config: OpenVLAQuantizationConfig) -> dict[str, nn.Linear]:
    """Name -> layer of those that get `config.bits`; a warning where they are the smaller part of the weights, a
    `ValueError` where there is none."""
    kind = LINEARS[config.bits]
    check_parts(model, config.modules_to_not_convert or ())
    kept = [
        *NEVER_QUANTIZED,
        *(NOT_QUANTIZED if config.modules_to_not_convert is None else config.modules_to_not_convert),
    ]
    known: Any = model
    output = known.get_output_embeddings()  # BioGPT's has another name than those that are kept
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in LINEAR
        and kind.fits(module.in_features)
        and not _is_part(name, kept)
        and module is not output
    }
    if not found:  # the folder, and every figure of it, would have a name that says otherwise
        raise ValueError(
            f"No weight can have {_named(config)}: this language model ({known.config.text_config.model_type}) has no "
            "torch.nn.Linear, none whose rows are long enough, or all are excepted. Leave quantization out."
        )
    table = known.get_input_embeddings().weight
    matrices = [
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and weight is not table and not _is_part(name, kept)
    ]
    share = sum(layer.weight.numel() for layer in found.values()) / sum(matrices)
    if share < LEAST_SHARE:
        warnings.warn(
            f"{share:.0%} of the weights can have {_named(config)}, all others stay as they are: this language model "
            f"({known.config.text_config.model_type}) keeps them elsewhere than in torch.nn.Linear (experts in one "
            "tensor), or in rows of another length.",
            stacklevel=2,
        )
    return found


def check_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Raise a `ValueError` where something is to stay as it is that the model does not have: what was meant would be
    rounded."""
    names = [name for name, _ in model.named_modules()]
    for part in parts:
        if part not in NOT_QUANTIZED and not any(_is_part(name, [part]) for name in names):
            own = {name for path in names for name in path.split(".") if not name.isdecimal()}
            raise ValueError(
                f"modules_to_not_convert names '{part}', and the model has no such part.{closest(part, own)}"
            )


def quantize_linears(model: nn.Module, config: OpenVLAQuantizationConfig) -> nn.Module:
    """Round the layers of a model that is in memory, one after the other; it is saved and loaded as any other is."""
    for name, layer in linears_to_quantize(model, config).items():
        kind = LINEARS[config.bits]
        stored = rounded(kind, f"{name}.weight", layer.weight)
        with torch.device("meta"):
            small = kind(layer.in_features, layer.out_features, layer.bias is not None)
        bias = {} if layer.bias is None else {"bias": layer.bias.data}
        small.load_state_dict({key.rpartition(".")[2]: value for key, value in stored.items()} | bias, assign=True)
        model.set_submodule(name, small.requires_grad_(False).train(layer.training))
    known: Any = model  # as the library marks a model that it has loaded so
    known.config.quantization_config, known.is_quantized, known.quantization_method = config, True, METHOD
    known.hf_quantizer = OpenVLAQuantizer(config, pre_quantized=False)  # `dequantize` asks it
    return model


def _is_part(name: str, parts: Collection[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


class OpenVLAQuantizer(HfQuantizer):
    """What the library asks while it loads."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *_: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, layer in linears_to_quantize(model, self.quantization_config).items():
            dtype = None if self.pre_quantized else layer.weight.dtype
            with torch.device("meta"):
                kind = LINEARS[self.quantization_config.bits]
                model.set_submodule(name, kind(layer.in_features, layer.out_features, layer.bias is not None, dtype))
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        return tensor == "weight" and isinstance(module, QuantizedLinear) and not is_rounded(module.weight)

    def get_quantize_ops(self) -> ConversionOps:
        return _Round()

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                weight = module.dequantize(dtype or model.dtype)
                with torch.device("meta"):
                    plain = Linear(module.in_features, module.out_features, module.bias is not None)
                plain.weight, plain.bias = nn.Parameter(weight), module.bias  # type: ignore[assignment]
                model.set_submodule(name, plain)
        return model


class _Round(ConversionOps):
    """A weight that was read -> what is stored of it."""

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        ((name, value),) = input_dict.items()
        name = full_layer_name or name
        layer = model.get_submodule(name.rpartition(".")[0])
        weight = value[0] if isinstance(value, list) else value
        try:
            return rounded(type(layer), name, weight)
        except ValueError:  # which the library would hide in a page of its own: `check_quantized` says it
            found = rounded(type(layer), name, torch.nan_to_num(weight))
            return {key: value if key == name else value.fill_(torch.nan) for key, value in found.items()}


def rounded(kind: type[QuantizedLinear], name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> tensor of what is stored of the weight `name`; a `ValueError` with the name, if it is not finite."""
    try:
        found = kind.quantize(weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {f"{name.removesuffix('weight')}{tensor}": value for tensor, value in found.items()}


def check_asked(given: Any, stored: Any, where: Any) -> None:
    """Raise a `ValueError` if a folder is quantized already, and another form was asked for.

    Args:
        given: `quantization_config` of `from_pretrained`.
        stored: That of the folder.
        where: The folder.
    """
    asked, there = _named(given), _named(stored)
    if asked == there and stored.quant_method == METHOD and given.to_dict() != stored.to_dict():
        asked, there = f"{asked} in other parts", f"{there} but in {stored.modules_to_not_convert}"
    # Whoever asks bitsandbytes for 4 bits and no more asks for fp4, its default, and gets what is there.
    if asked != there and (asked, there) != (f"4 bits of {BNB} (fp4)", f"4 bits of {BNB} (nf4)"):
        raise ValueError(
            f"'{where}' holds weights of {there}, and {asked} were asked for: leave "
            "quantization out, or give the model that they were made of."
        )


def check_before_loading(kwargs: dict[str, Any], config: Mapping[str, Any], where: Any) -> None:
    """As `check_asked`, before weights are read, and before the library says that it passes over what was asked for.
    What is stored so already needs no asking, and is taken out of the arguments.

    Args:
        kwargs: Of `from_pretrained`, after `take_quantization`.
        config: Content of the folder's config.json.
    """
    given, fields = kwargs.get("quantization_config"), getattr(kwargs.get("config"), "quantization_config", None)
    fields = fields or config.get("quantization_config")
    if given is None or not fields or unknown_method(None, {"quantization_config": fields}):
        return
    stored = AutoQuantizationConfig.from_dict(dict(fields)) if isinstance(fields, Mapping) else fields
    check_asked(given, stored, where)
    del kwargs["quantization_config"]


def check_quantized(model: nn.Module, where: Any) -> None:
    """After loading: weights have the type that config.json says, and scales are numbers above 0.

    Args:
        where: What holds the weights.

    Raises:
        ValueError: If what the folder holds is of no form, or of another one.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    stored = getattr(quantizer, "quantization_config", None)
    if getattr(stored, "quant_method", None) != METHOD:
        return
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _, kind = module.stored(module.in_features, module.out_features)["weight"]
            if module.weight.dtype != kind:
                raise ValueError(
                    f"'{where}': the weights of {name} are {module.weight.dtype}, and {_named(stored)} are stored as "
                    f"{kind}: config.json is of another model, or something else wrote the file."
                )
            for buffer in module.fixed:
                values = module.get_buffer(buffer)
                steps = values[..., 0] if values.ndim == 3 else values  # of 4 bits beside the zeros
                if values.is_meta:
                    continue
                if not bool(torch.isfinite(values).all()):
                    raise ValueError(
                        f"'{where}': the weights of {name}, or their {buffer}, are not finite: the file is damaged, or "
                        "training diverged."
                    )
                if not bool(steps.gt(0).all()):
                    raise ValueError(
                        f"'{where}': {buffer} of {name} holds steps that are not above 0: the file is damaged, copy or "
                        "download it again."
                    )


def _named(config: Any) -> str:
    if getattr(config, "quant_method", METHOD) == BNB:
        return f"8 bits of {BNB}" if config.load_in_8bit else f"4 bits of {BNB} ({config.bnb_4bit_quant_type})"
    bits = getattr(config, "bits", config)
    return f"{bits} bits" if isinstance(bits, int) else str(bits)


def unknown_method(given: Any, config: Mapping[str, Any]) -> str | None:
    """`quant_method` of what was asked for, or else of a config.json, if it is none that this package knows."""
    stored = config.get("quantization_config") or {}
    method = getattr(given, "quant_method", None) or stored.get("quant_method")
    name = str(getattr(method, "value", method))  # of an enumeration of the library
    return None if method is None or name in KNOWN_METHODS else name


def has_quantized_layers(model: Any) -> bool:
    """Whether layers of ours are among its modules."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


# What rounded weights refuse ------------------------------------------------------------------------------------------


class QuantizedWeights:
    """Of a model: where its weights are rounded they neither learn, nor move once bitsandbytes has packed them; where
    they are not, they take no whole numbers.
    """

    device: Any
    dtype: Any
    named_parameters: Any
    parameters: Any

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # torch would make floats of whole numbers without their steps, silently with strict=False.
        few = [
            name
            for name, own in self.named_parameters()
            if not is_rounded(own) and (given := state_dict.get(f"{prefix}{name}")) is not None and is_rounded(given)
        ]
        if few:
            raise ValueError(
                f"{len(few)} weights, for example {few[0]}, are those of a quantized model, and this one is not: load "
                "the folder of that model with from_pretrained."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True):
        """As in every torch module; a `ValueError` where weights of few bits were to learn."""
        if requires_grad and any(map(is_rounded, self.parameters())):
            raise ValueError(
                "Weights of a quantized model do not learn: model.dequantize() gives plain layers back; or take the "
                "model that it was made of, or let adapters learn (openvla finetune --strategy qlora)."
            )
        return super().requires_grad_(requires_grad)  # type: ignore[misc]

    def dequantize(self, dtype: torch.dtype | None = None):
        """As in every model of the library: plain layers, in the type of the model where none is given."""
        unpack_blocks(self)  # type: ignore[arg-type]
        # The library takes config.dtype: of before a cast, and a text once the model was saved (5.4 to 5.24).
        plain = super().dequantize(dtype or self.dtype)  # type: ignore[misc]
        plain.__dict__.pop("_weight_conversions", None)  # to what was quantized: 5.4 would save by them, and cannot
        return plain

    def to(self, *args, **kwargs):
        """As in every torch module; a model that bitsandbytes quantized stays where it was loaded."""
        if getattr(self, "quantization_method", None) in (None, METHOD):
            return super().to(*args, **kwargs)  # type: ignore[misc]
        given = [value for value in (*args, *kwargs.values()) if not isinstance(value, (bool, torch.memory_format))]
        given += [part for value in given if isinstance(value, torch.Tensor) for part in (value.device, value.dtype)]
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        device = next((torch.device(value) for value in given if isinstance(value, (str, int, torch.device))), None)
        if dtype is None and (device is None or device == self.device):
            return self
        raise ValueError(
            f"A quantized model cannot be moved or cast after loading (asked for {device or dtype}, it is on "
            f"{self.device}): its packed weights belong to one device and type. Choose both when loading, "
            f"from_pretrained(..., quantization_config=..., device_map={{'': '{device or self.device}'}}, dtype=...), "
            "and leave out .to()."
        )


# bitsandbytes ---------------------------------------------------------------------------------------------------------


def turn_block_scales_back(model: nn.Module) -> None:
    """bitsandbytes 0.50 packs 4-bit weights when they first run on a CPU with AVX512-BF16 and, without double
    quantization, forgets to turn the scales of their blocks back when it unpacks them for saving."""
    for layer in packed_layers(model):
        state = layer.weight.quant_state
        if not state.original_nested and state.absmax.ndim == 2:
            state.absmax = state.absmax.T.flatten().float()


def unpack_blocks(model: nn.Module) -> None:
    """Back to what bitsandbytes reads everywhere but in that product: what is packed it multiplies out as if it were
    not, to other weights, silently (0.50)."""
    for layer in packed_layers(model):
        layer.weight.quant_state.original_nested = False  # scales of blocks stay as they are, and are not rounded again
        turn_block_scales_back(layer)
        layer.state_dict()  # unpacks


def leave_blocks_unpacked(model: nn.Module) -> None:
    """For what reads weights beside that product: adapters, which are merged into them and learn through them (packed,
    they have wrong gradients)."""
    unpack_blocks(model)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def packed_layers(model: nn.Module) -> list[Any]:
    """Those of 4 bits that bitsandbytes has packed for a CPU."""
    states = ((layer, getattr(layer._parameters.get("weight"), "quant_state", None)) for layer in model.modules())
    return [layer for layer, state in states if getattr(state, "packing_format_for_cpu", False)]


def keep_split_blocks_from_packing(model: nn.Module) -> None:
    """bitsandbytes 0.50 packs 4-bit weights for CPUs with AVX512-BF16, and fails where a row ends inside a block or the
    rows are no multiple of 32."""
    layer: Any
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            divides = layer.in_features % layer.weight.blocksize == 0 and layer.out_features % 32 == 0
            layer.support_avx512bf16_for_cpu = divides


def cast_unquantized(model: nn.Module) -> None:
    """Of a folder that bitsandbytes quantized, transformers (5.4 to 5.24) leaves the matrices that it did not quantize
    in the type they are stored in, and casts the others as asked."""
    known: Any = model  # of the library
    quantizer = getattr(known, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized and quantizer.quantization_config.quant_method != METHOD:
        for parameter in model.parameters():  # packed ones are of other classes, and may be of any type
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.to(known.config.dtype or parameter.dtype)


__all__ = ["NOT_QUANTIZED", "OpenVLAQuantizationConfig", "QuantizedWeights", "leave_blocks_unpacked"]

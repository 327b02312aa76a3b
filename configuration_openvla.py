"""Configuration of OpenVLA: which vision towers, which language model, which action space.

`OpenVLAConfig` reads the published `config.json` of `openvla/openvla-7b`, `openvla/openvla-v01-7b` and everything
fine-tuned from them, and names three things those files leave implicit: the sizes of the towers
(`timm_model_kwargs`), the id of the image placeholder and the id of the empty token that ends a prompt.
"""

import difflib
from typing import Any, ClassVar

import transformers


MINIMUM_TRANSFORMERS = (5, 4)
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if TRANSFORMERS < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"OpenVLA needs transformers >= {'.'.join(map(str, MINIMUM_TRANSFORMERS))}, found {transformers.__version__}: "
        "run `pip install -U transformers`."
    )

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # noqa: E402 - after the version is known to fit


# Vision ids of the original: one (timm model, square image size in pixels, activation override) per tower. The
# override is what timm itself used when the published weights were trained, where a later timm may differ.
VISION_BACKBONES: dict[str, list[tuple[str, int, str | None]]] = {
    "clip-vit-l": [("vit_large_patch14_clip_224.openai", 224, "quick_gelu")],
    "clip-vit-l-336px": [("vit_large_patch14_clip_336.openai", 336, "quick_gelu")],
    "dinov2-vit-l": [("vit_large_patch14_reg4_dinov2.lvd142m", 224, None)],
    "in1k-vit-l": [("vit_large_patch16_224.augreg_in21k_ft_in1k", 224, None)],
    "siglip-vit-so400m": [("vit_so400m_patch14_siglip_224", 224, None)],
    "siglip-vit-so400m-384px": [("vit_so400m_patch14_siglip_384", 384, None)],
    "dinoclip-vit-l-336px": [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 336, None),
        ("vit_large_patch14_clip_336.openai", 336, "quick_gelu"),
    ],
    "dinosiglip-vit-so-224px": [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 224, None),
        ("vit_so400m_patch14_siglip_224", 224, None),
    ],
    "dinosiglip-vit-so-384px": [
        ("vit_large_patch14_reg4_dinov2.lvd142m", 384, None),
        ("vit_so400m_patch14_siglip_384", 384, None),
    ],
}

# Language-model ids of the original: (weights on the Hub, transformers model type).
LLM_BACKBONES: dict[str, tuple[str, str]] = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "llama"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "llama"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "llama"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "llama"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "llama"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "mistral"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    "phi-2-3b": ("microsoft/phi-2", "phi"),
}

IMAGE_RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")


def closest(name: Any, known) -> str:
    """The entry of `known` nearest to `name`, whatever the case, as a ready-made hint (' Did you mean ...?'); an empty
    string where none is near."""
    folded = {str(entry).casefold(): str(entry) for entry in known}
    matches = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    return f" Did you mean '{folded[matches[0]]}'?" if matches else ""


def check_choice(field: str, value: Any, known) -> None:
    """Raise a `ValueError` that names `field`, the value given, the values known and the nearest of them."""
    if value not in known:
        raise ValueError(f"{field}={value!r} is unknown.{closest(value, known)} Known: {', '.join(map(str, known))}.")


class OpenVLAConfig(PreTrainedConfig):
    """Everything needed to build an `OpenVLAForActionPrediction` except the weights.

    Args:
        vision_backbone_id: One of `VISION_BACKBONES`; decides towers, image sizes and activations.
        llm_backbone_id: One of `LLM_BACKBONES`; decides the class of `text_config` and the prompt form.
        arch_specifier: Published field, kept as it is; the projector follows `use_fused_vision_backbone`.
        use_fused_vision_backbone: Two towers with concatenated features. Default: what `vision_backbone_id` implies.
        image_resize_strategy: `"resize-naive"`, `"resize-crop"` or `"letterbox"`.
        text_config: Configuration (or dict) of the language model.
        llm_max_length: Longest text prompt in tokens, patches not counted.
        pad_token_id: Default: that of `text_config`.
        pad_to_multiple_of: Rows by which the embedding table exceeds the tokenizer's own vocabulary, so that
            `text_config.vocab_size - pad_to_multiple_of` is the end of the action tokens.
        output_projector_states: Published field, kept as it is.
        norm_stats: `{dataset: {"action": {"q01", "q99", "mask", ...}}}`, the statistics that un-normalize actions.
        n_action_bins: Number of action tokens; they are the last ids of the tokenizer's own vocabulary.
        timm_model_kwargs: One dict per tower, passed on to `timm.create_model` (sizes of small models).
        image_token_id: Placeholder that stands for one image patch inside the model. Default: the last row of the
            embedding table, which no tokenizer of a published checkpoint uses.
        empty_token_id: Id of the lone word-boundary token `▁` that ends a prompt. Default: asked of the tokenizer.
    """

    model_type = "openvla"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    # What is None here is filled in by `__post_init__`.
    vision_backbone_id: str = "siglip-vit-so400m"
    llm_backbone_id: str = "vicuna-v15-7b"
    arch_specifier: str | None = "no-align+gelu-mlp"
    use_fused_vision_backbone: bool = None  # type: ignore[assignment]
    image_resize_strategy: str = "letterbox"
    text_config: Any = None
    llm_max_length: int = 2048
    pad_token_id: int | None = None
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    norm_stats: dict | None = None
    n_action_bins: int = 256
    timm_model_ids: list = None  # type: ignore[assignment]
    timm_override_act_layers: list = None  # type: ignore[assignment]
    image_sizes: list = None  # type: ignore[assignment]
    hf_llm_id: str | None = None
    timm_model_kwargs: list = None  # type: ignore[assignment]
    image_token_id: int = None  # type: ignore[assignment]
    empty_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        check_choice("vision_backbone_id", self.vision_backbone_id, VISION_BACKBONES)
        check_choice("llm_backbone_id", self.llm_backbone_id, LLM_BACKBONES)
        check_choice("image_resize_strategy", self.image_resize_strategy, IMAGE_RESIZE_STRATEGIES)

        model_ids, sizes, activations = map(list, zip(*VISION_BACKBONES[self.vision_backbone_id]))
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(model_ids) > 1
        self.timm_model_ids = model_ids if self.timm_model_ids is None else self.timm_model_ids
        self.timm_override_act_layers = (
            activations if self.timm_override_act_layers is None else self.timm_override_act_layers
        )
        self.image_sizes = sizes if self.image_sizes is None else self.image_sizes
        if self.timm_model_kwargs is None:
            self.timm_model_kwargs = [{} for _ in self.timm_model_ids]
        towers = 2 if self.use_fused_vision_backbone else 1
        for field in ("timm_model_ids", "timm_override_act_layers", "image_sizes", "timm_model_kwargs"):
            if len(getattr(self, field)) != towers:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} entries for {towers} vision tower(s): give one per tower "
                    f"or leave it out to take what vision_backbone_id='{self.vision_backbone_id}' means."
                )

        llm_on_hub, text_model_type = LLM_BACKBONES[self.llm_backbone_id]
        self.hf_llm_id = llm_on_hub if self.hf_llm_id is None else self.hf_llm_id
        if self.text_config is None:
            # As the published training code had it: one padding token after the model's own vocabulary, the embedding
            # table then filled up by `pad_to_multiple_of` rows.
            vocabulary = CONFIG_MAPPING[text_model_type]().vocab_size
            self.text_config = {"vocab_size": vocabulary + self.pad_to_multiple_of, "pad_token_id": vocabulary}
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[fields.pop("model_type", text_model_type)](**fields)

        if self.pad_token_id is None:
            self.pad_token_id = self.text_config.pad_token_id
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - 1
        if not 2 <= self.n_action_bins <= self.action_vocab_size:
            raise ValueError(
                f"n_action_bins={self.n_action_bins} does not fit a vocabulary of {self.action_vocab_size} tokens "
                f"(text_config.vocab_size={self.text_config.vocab_size}, pad_to_multiple_of={self.pad_to_multiple_of})."
            )
        super().__post_init__(**kwargs)

    @property
    def action_vocab_size(self) -> int:
        """End of the tokenizer's own vocabulary; the last `n_action_bins` ids before it are the action tokens."""
        return self.text_config.vocab_size - self.pad_to_multiple_of


__all__ = ["OpenVLAConfig"]

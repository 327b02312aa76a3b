"""OpenVLA: an image and an instruction go in, a robot action comes out.

One prediction goes through `processing_openvla` (prompt and pixels), `vision_openvla` (towers, projector), the language
model here, `decoding_openvla` (which token) and `action_tokenizer` (units); `predict_action` names the steps.

Shapes: `batch` samples, `length` prompt tokens, `num_patches` image patches (256 at 224 pixels), `hidden` width of the
language model, `action_dim` numbers of one action.

The published weights (`openvla/openvla-7b`, `openvla/openvla-v01-7b`) keep their tensor names. Differences from the
published code are listed in the README.
"""

import json
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import cached_file, is_peft_available

from .action_tokenizer import (
    ActionTokenizer,
    check_same_action_dim,
    check_statistics,
    get_action_stats,
    read_statistics,
    resolve_unnorm_key,
    unnormalize_actions,
)
from .adapters_openvla import (
    KEY,
    AdapterBelongings,
    belongings,
    check_base,
    find_adapter,
    find_base,
    read_belongings,
    with_belongings,
)
from .choices_openvla import closest
from .configuration_openvla import TRANSFORMERS, OpenVLAConfig
from .decoding_openvla import (
    Sampling,
    as_tensor,
    check_finite,
    check_flag,
    check_pixel_values,
    choose_token,
    evaluation_mode,
    one_type,
    prompt_rows,
    read_sampling,
)
from .files_openvla import local_folder
from .generation_openvla import OpenVLAGeneration

# Of a local folder transformers 5.4 and 5.5 copy no more than this file names: also what others import.
from .image_processing_openvla import OpenVLAImageProcessor as _OpenVLAImageProcessor  # noqa: F401
from .loading_openvla import LOADING, QUIET, check_filled, check_folder, check_loaded, check_placed
from .outputs_openvla import CACHE, CACHE_NAMES, ActionPrediction, OpenVLAOutput, one_cache
from .patches_openvla import IGNORE_INDEX, PatchLayout, find_placeholders
from .pixels_openvla import as_image_list, is_image_list, load_image
from .processing_openvla import HUB_KWARGS, OpenVLAProcessor
from .prompts_openvla import check_prompt_ids
from .quantization_openvla import keep_split_blocks_from_packing, take_quantization, turn_block_scales_back
from .vision_openvla import OpenVLAProjector, OpenVLAVisionBackbone, init_vision_weights


# The model ------------------------------------------------------------------------------------------------------------


class OpenVLAPreTrainedModel(PreTrainedModel):
    config: OpenVLAConfig
    config_class = OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenVLAVisionBackbone", "OpenVLAProjector"]  # those of the language model add themselves
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what `module` itself owns (Linear, Conv, Embedding and norms are the library's)."""
        super()._init_weights(module)
        init_vision_weights(module)


# GenerationMixin is named for the library, which looks for it among the direct bases (transformers 5.4 to 5.24).
class OpenVLAForActionPrediction(AdapterBelongings, OpenVLAGeneration, OpenVLAPreTrainedModel, GenerationMixin):
    """Vision towers, projector and language model, under the published tensor names.

    `forward` and `generate` take the plain prompts of `OpenVLAProcessor` and insert the image patches after the first
    token by themselves. Prompts that already hold `num_patches` placeholders (`config.image_token_id`) per row are
    taken as they are.
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = OpenVLAVisionBackbone(config)
        self.projector = OpenVLAProjector(
            self.vision_backbone.embed_dim, config.text_config.hidden_size, config.use_fused_vision_backbone
        )
        # One dtype for the whole model, also where the config names another for its language model.
        try:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        except (TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"text_config cannot be built as a language model: {error}") from error
        self.action_tokenizer = ActionTokenizer(config.action_vocab_size, config.n_action_bins)
        # Published names, which clients of the original read
        self.vocab_size: int = config.action_vocab_size  # end of the action tokens
        self.bins: np.ndarray = self.action_tokenizer.bins
        self.bin_centers: np.ndarray = self.action_tokenizer.bin_centers
        self.pad_token_id: int | None = config.pad_token_id
        self.llm_dim: int = config.text_config.hidden_size
        self._processor: OpenVLAProcessor | None = None
        self._processor_is_set = False
        self._adapted_processor: tuple[dict | None, OpenVLAProcessor | None] = (None, None)
        self._hub_kwargs: dict[str, Any] = {}
        self._checked_statistics: dict[str, Any] = {}
        self.post_init()

    # Loading and saving -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a folder or Hub id, published layout or ours; `dataset_statistics.json` wins over `config.norm_stats`.

        With a `quantization_config` that names no exceptions, vision towers, projector and lm_head stay unquantized.
        A folder that holds a PEFT adapter is loaded together with the base it names.

        Args:
            ignore_mismatched_sizes: Let tensors of another shape than the stored ones begin at random.
            norm_stats: Statistics that count instead of those of the folder.
            output_loading_info: Return the model, and a dict of the names that are missing, unexpected or of another
                shape, instead of raising an error for them.

        Raises:
            FileNotFoundError: If there is no such folder or Hub id, no config.json, or a weight file is missing.
            ValueError: If a file is damaged or a Git LFS pointer, or the weights lack tensors of the model, hold others
                or of another shape: nothing stays random.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        given = check_statistics(kwargs["norm_stats"]) if kwargs.get("norm_stats") is not None else None
        of_adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        # Of a Hub id AutoModel passes the base, and the adapter beside it.
        adapter_name = of_adapter.pop("_adapter_model_path", None)
        if adapter_name is None:
            adapter_name = name
            of_adapter = {**hub, **of_adapter}
        adapter = None if adapter_name is None else find_adapter(adapter_name, of_adapter)
        if adapter is not None:
            # Not of the base: where the adapter's repository was named, which revision and folder of it
            left_out = ("norm_stats", *(("revision", "subfolder") if adapter_name is name else ()))
            kwargs = {key: value for key, value in kwargs.items() if key not in left_out}
            loaded = cls._from_adapter(adapter, *model_args, **kwargs)
            if given is not None:
                (loaded[0] if isinstance(loaded, tuple) else loaded).norm_stats = given
            return loaded
        take_quantization(kwargs)
        loaded = cls._load(name, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._hub_kwargs = hub
        keep_split_blocks_from_packing(model)
        if given is not None:
            model.config.norm_stats = given
        elif name is not None:
            file = cached_file(name, "dataset_statistics.json", **QUIET, **hub)
            if file is not None:
                model.config.norm_stats = read_statistics(file)
            elif model.config.norm_stats:
                where = f"norm_stats of '{model.config.name_or_path}'"
                model.config.norm_stats = check_statistics(model.config.norm_stats, where)
        return loaded

    @classmethod
    def _from_adapter(cls, adapter: Path, *model_args, **kwargs):
        """The base of an adapter in a local folder, and the adapter on it."""
        adapter_name = kwargs.pop("adapter_name", None) or "default"
        base = find_base(adapter)
        loaded = cls.from_pretrained(base, *model_args, **kwargs)
        problem = check_base(base, read_belongings(adapter).get("base_digest"))
        if problem:
            raise ValueError(
                f"{problem}. Put its own base back, or add '{adapter}' to this one yourself: model = "
                "OpenVLAForActionPrediction.from_pretrained(BASE), then model.load_adapter(RUN)."
            )
        (loaded[0] if isinstance(loaded, tuple) else loaded).load_adapter(str(adapter), adapter_name)
        return loaded

    @classmethod
    def _load(cls, name, *model_args, ignore_mismatched_sizes=False, output_loading_info=False, **kwargs):
        """`from_pretrained` of the library, after which every tensor of the model is known to come from the weights."""
        if name is not None:
            check_folder(name, {**kwargs, "output_loading_info": output_loading_info})
        try:
            model, info = super().from_pretrained(
                name, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except TypeError as error:
            if "__init__() got an unexpected keyword argument" not in str(error):
                raise
            unknown = next((key for key in kwargs if f"'{key}'" in str(error)), "")
            raise ValueError(
                f"from_pretrained does not know {unknown}={kwargs.get(unknown)!r:.100}."
                f"{closest(unknown, {*OpenVLAConfig().to_dict(), *LOADING})}"
            ) from error
        check_placed(model.device, kwargs.get("device_map"))
        if output_loading_info:
            return model, info
        if name is not None or kwargs.get("state_dict"):  # an empty state_dict: all random on purpose
            check_loaded(name, info, ignore_mismatched_sizes)
            check_filled(name, model.named_parameters())
        return model

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights under the published names, with the statistics beside them."""
        turn_block_scales_back(self)
        self._keep_action_tokens()
        super().save_pretrained(save_directory, **kwargs)
        if self.norm_stats and kwargs.get("is_main_process", True):
            with open(f"{save_directory}/dataset_statistics.json", "w", encoding="utf-8") as stream:
                json.dump(self.norm_stats, stream, indent=2)

    def load_adapter(self, peft_model_id=None, adapter_name=None, *args, **kwargs):
        """As in every model of the library: a PEFT adapter from a folder or Hub id. It brings the statistics, prompt
        form and pixels of its training, which count while it is active."""
        hub = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs} | (kwargs.get("adapter_kwargs") or {})
        kwargs["adapter_kwargs"] = hub  # the library takes them nowhere else
        folder = None if peft_model_id is None else local_folder(peft_model_id)
        if folder is not None and hub.get("subfolder"):
            peft_model_id = str(folder / hub.pop("subfolder"))  # transformers 5.4 looks only on the Hub into subfolders
        brought = {} if peft_model_id is None else read_belongings(peft_model_id, **hub)
        if (
            TRANSFORMERS < (5, 6)
            and peft_model_id is not None
            and "adapter_state_dict" not in kwargs
            and is_peft_available()
        ):
            # transformers 5.4 and 5.5 find the weights of an adapter only under "model." and leave all others random.
            from peft.utils import load_peft_weights

            where = {name: hub[name] for name in HUB_KWARGS if name in hub}
            kwargs["adapter_state_dict"] = {
                name.removeprefix("base_model.model."): weight
                for name, weight in load_peft_weights(peft_model_id, device="cpu", **where).items()
            }
        loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        self._bring(adapter_name or "default", brought)
        return loaded

    @property
    def norm_stats(self) -> dict | None:
        """Statistics of the training datasets (published name): of the adapters that are active and brought some, else
        of the base, where they are saved with the config."""
        own = self._adapter_statistics()
        return self.config.norm_stats if own is None else own

    @norm_stats.setter
    def norm_stats(self, value: dict | None) -> None:
        active = [config for config in self._active_adapters() if belongings(config).keys() & {"norm_stats", "unknown"}]
        for config in active:
            brought = {**belongings(config), "norm_stats": value}
            brought.pop("unknown", None)
            config.auto_mapping = {**config.auto_mapping, KEY: brought}
        if not active:
            self.config.norm_stats = value

    @property
    def processor(self) -> OpenVLAProcessor:
        """The processor of the folder the model came from, loaded when first needed, with the pixels and prompt form of
        an active adapter; may be set."""
        if self._processor is None:
            if not self.config.name_or_path:
                raise ValueError(
                    "The model was made from a config and knows no processor: set model.processor = "
                    "OpenVLAProcessor.from_pretrained(folder)."
                )
            processor = OpenVLAProcessor.from_pretrained(self.config.name_or_path, **self._hub_kwargs)
            processor.check_fits(self.config)
            self._processor = processor
        if self._processor_is_set:
            return self._processor
        brought = self._adapter_processor()
        if brought != self._adapted_processor[0]:
            processor = with_belongings(self._processor, brought)
            processor.check_fits(self.config)
            self._adapted_processor = brought, processor
        return self._adapted_processor[1] or self._processor

    @processor.setter
    def processor(self, value: OpenVLAProcessor) -> None:
        if not hasattr(value, "check_fits"):  # by name: that of a Hub folder's own code is another class
            raise ValueError(f"model.processor is an OpenVLAProcessor, got {type(value).__name__}.")
        value.check_fits(self.config)
        self._processor, self._processor_is_set = value, True

    def to(self, *args, **kwargs):
        """As in every torch module; a quantized model stays where it was loaded."""
        if getattr(self, "quantization_method", None) is None:
            return super().to(*args, **kwargs)
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

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where the model computes, also if its weights are offloaded and lie on "meta"."""
        device = next(parameter.device for parameter in self.parameters())
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())  # of accelerate
            execution = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((where for where in execution if where is not None), device))
        return device

    # Embeddings -------------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in every model of the library; the new rows come after the action tokens, which keep their ids. With a
        table that loses tokens which actions need, a model neither predicts nor is saved, and a warning says so."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if cut := self._cut_table():
            warnings.warn(f"{cut} It neither predicts nor is saved.", stacklevel=2)
        else:
            self._keep_action_tokens()
        self.vocab_size = self.action_tokenizer.vocabulary_end  # published name, to which the library gives the rows
        return embeddings

    def _cut_table(self) -> str:
        """What is wrong where the embedding table has lost tokens that the model needs; else nothing."""
        end, rows = self.action_tokenizer.vocabulary_end, self.config.text_config.vocab_size
        needed = max(end - 1, self.config.image_token_id, self.config.pad_token_id or 0) + 1
        if rows >= needed:
            return ""
        return (
            f"The embedding table has {rows} rows; action tokens end at {end}, the placeholder of the image "
            f"(image_token_id) is {self.config.image_token_id}: give resize_token_embeddings at least {needed}."
        )

    def _keep_action_tokens(self) -> None:
        """Let the config say where they end, also if the table of the language model alone was resized; a `ValueError`
        if they are not there any more."""
        if cut := self._cut_table():
            raise ValueError(cut)
        self.config.pad_to_multiple_of = self.config.text_config.vocab_size - self.action_tokenizer.vocabulary_end
        self.config.check_fields()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # Forward ----------------------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3 * towers, height, width) -> (batch, num_patches, hidden), in type and on device of the model."""
        features = self.vision_backbone(pixel_values.to(self.device))
        projector = next((p.dtype for p in self.projector.parameters() if p.is_floating_point()), features.dtype)
        return self.projector(features.to(projector))

    def _placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
        return find_placeholders(
            input_ids,
            inputs_embeds,
            self.vision_backbone.num_patches,
            self.config.image_token_id,
            self.get_input_embeddings(),
        )

    def _merge(self, input_ids, inputs_embeds, attention_mask, features) -> tuple[torch.Tensor, PatchLayout | None]:
        """Embeddings with the patches in place, and where they stand if they were inserted (None: at placeholders)."""
        placeholders = self._placeholders(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if features.shape[0] != inputs_embeds.shape[0]:
            raise ValueError(
                f"{features.shape[0]} image(s) for {inputs_embeds.shape[0]} prompt(s): give one image for each prompt."
            )
        layout = None
        if placeholders is None:
            shape = inputs_embeds.shape[:2]
            if attention_mask is not None and attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; with a plain prompt and an image give "
                    f"(batch, length), here {tuple(shape)}: the patches are added to it."
                )
            layout = PatchLayout(attention_mask, shape, features.shape[1], device=inputs_embeds.device)
            inputs_embeds, placeholders = layout.insert(inputs_embeds, 0.0), layout.is_patch
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders[..., None].to(inputs_embeds.device), features), layout

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_projector_features: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> OpenVLAOutput | tuple:
        """Logits (and loss) of prompts, with or without an image.

        Args:
            input_ids: (batch, length) plain prompt, padded on either side, or one with placeholders.
            attention_mask: (batch, length), 0 marks padding.
            pixel_values: (batch, 3 * towers, height, width) normalized images, or None for text alone.
            labels, position_ids: (batch, length) in the coordinates of `input_ids`; label -100 where no loss is wanted.
            inputs_embeds: (batch, length, hidden) instead of `input_ids`.
            output_projector_features: With `return_dict=False`, append the projected patches to the tuple.
            logits_to_keep: Compute logits of the last so many positions only (0: of all).
            cache: Another name of `past_key_values`.

        Returns:
            `OpenVLAOutput`, or a tuple if `return_dict` is False.

        Raises:
            ValueError: If neither or both of `input_ids` and `inputs_embeds` are given, or images do not fit prompts.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        features = None
        if pixel_values is not None:
            features = self.encode_images(pixel_values)
            inputs_embeds, layout = self._merge(input_ids, inputs_embeds, attention_mask, features)
            input_ids = None
            if layout is not None:
                attention_mask = layout.insert(attention_mask, 1)
                position_ids = layout.insert_positions(position_ids)
                labels = layout.insert(labels, IGNORE_INDEX)
                # Of sequence parallel training; as long as the logits, they count the patches already.
                shifted = kwargs.get("shift_labels")
                if shifted is not None and shifted.shape[1] != layout.is_patch.shape[1]:
                    kwargs["shift_labels"] = layout.insert_shifted(shifted)
        for name, value in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            value = getattr(self.config, name) or None if value is None else value
            if value is not None:  # left to the language model's own config otherwise
                kwargs[name] = value
        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: one_cache(cache, past_key_values)},
            **kwargs,
        )
        if pixel_values is not None and outputs.get(CACHE) is not None and not torch.compiler.is_compiling():
            outputs[CACHE].image_in_cache = pixel_values
        output = OpenVLAOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            projector_features=features if return_dict or output_projector_features else None,
            **{CACHE: outputs.get(CACHE)},
        )
        return output if return_dict else output.to_tuple()

    # Actions ----------------------------------------------------------------------------------------------------------

    _check_unnorm_key = staticmethod(resolve_unnorm_key)  # published name

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Numbers in one action of a dataset."""
        return len(get_action_stats(self.norm_stats, unnorm_key)["q01"])

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Action statistics of a dataset."""
        return get_action_stats(self.norm_stats, unnorm_key)

    @torch.inference_mode()
    def predict_action(
        self,
        image=None,
        instruction=None,
        unnorm_key: str | list[str] | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        constrained: bool = True,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
        **options,
    ) -> np.ndarray | ActionPrediction:
        """Predict one action, or a batch of them.

        Two forms: `predict_action(image, instruction)` with raw images and instructions (lists for a batch), or the
        published `predict_action(**processor(prompt, image))`.

        Args:
            image: Anything `load_image` reads, or a list of such. A 2-D integer tensor, or whatever comes with
                `pixel_values`, is taken as `input_ids`, the first argument of the published form.
            instruction: What to do, for example "open the drawer"; one string for each image. See `format_prompt`.
            unnorm_key: Dataset whose statistics give the action its units; one, or one per sample. May be left out
                where the model knows only one dataset.
            input_ids, attention_mask, pixel_values: The published form, as tensors, arrays or lists.
            constrained: Choose among action tokens only. False: among the whole vocabulary, as the published code;
                text tokens are then clipped to the nearest bin.
            do_sample, temperature, top_k, top_p, generator: Sample instead of taking the most probable token.
            return_dict: Return an `ActionPrediction` with tokens, probabilities and entropies.
            options: Of `generate`, as scripts written against the original pass them (`use_cache`, `max_new_tokens`,
                `generation_config`, ...): taken where they ask for what is done here anyway, else refused.

        Returns:
            float64 array (action_dim,), or (batch, action_dim) for a list of images or more than one prompt. The same
            in train mode, which is left for the time of the prediction, and from several threads at once.

        Raises:
            ValueError: Before any compute, if an input is missing, empty, not finite, too long or of a wrong count, or
                an option is unknown; after it, if the model computed something that is not finite.
            KeyError: If `unnorm_key` is unknown.
            FileNotFoundError: If an image is a path that does not exist.
        """
        check_flag("constrained", constrained)
        check_flag("return_dict", return_dict)
        if cut := self._cut_table():
            raise ValueError(cut)
        if self.device.type == "meta":
            raise ValueError(
                'The weights are on "meta", where they have no values: load the model with from_pretrained.'
            )
        is_ids = isinstance(image, torch.Tensor) and image.ndim == 2 and image.dtype == torch.long
        if input_ids is None and image is not None and (is_ids or pixel_values is not None):
            image, input_ids = None, image
            if isinstance(instruction, str) and unnorm_key is None:
                instruction, unnorm_key = None, instruction

        if input_ids is None:
            if pixel_values is not None:
                raise ValueError("pixel_values without input_ids: give both, or a raw image and an instruction.")
            single, inputs = self._process_raw(image, instruction)
            input_ids, attention_mask, pixel_values = (
                inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
            )  # fmt: skip
        else:
            if image is not None or instruction is not None:
                raise ValueError("Give either a raw image and an instruction, or input_ids and pixel_values, not both.")
            input_ids = as_tensor("input_ids", input_ids)
            single = input_ids.ndim == 2 and len(input_ids) == 1
        prompts, pixel_values = self._check_model_inputs(input_ids, attention_mask, pixel_values)
        keys = list(unnorm_key) if isinstance(unnorm_key, (list, tuple)) else [unnorm_key] * len(prompts)
        if len(keys) != len(prompts):
            raise ValueError(f"{len(keys)} unnorm_keys for {len(prompts)} sample(s): give one, or one for each.")
        norm_stats, checked = self.norm_stats, self._checked_statistics
        action_dim = check_same_action_dim(norm_stats, keys, checked)
        sampling = read_sampling(
            action_dim, signature(self.predict_action).parameters, self.device, do_sample=do_sample,
            temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, **options,
        )  # fmt: skip

        input_ids, attention_mask = self._end_prompt(prompts, action_dim)
        with evaluation_mode(self), one_type(self):
            token_ids, probabilities, entropies = self._decode_action_tokens(
                input_ids, attention_mask, pixel_values, action_dim, constrained=constrained, sampling=sampling
            )

        chosen, chosen_probabilities = token_ids.cpu().numpy(), probabilities.cpu().numpy()
        check_finite(chosen_probabilities, self.dtype)
        normalized = self.action_tokenizer.decode(chosen)
        actions = np.stack(
            [unnormalize_actions(row, get_action_stats(norm_stats, key, checked)) for row, key in zip(normalized, keys)]
        )
        prediction = ActionPrediction(
            actions=actions,
            normalized_actions=normalized,
            token_ids=chosen,
            token_probabilities=chosen_probabilities,
            token_entropies=entropies.cpu().numpy(),
        )
        if single:
            prediction = ActionPrediction(**{name: value[0] for name, value in prediction.items()})
        return prediction if return_dict else prediction["actions"]

    def _process_raw(self, image, instruction) -> tuple[bool, Any]:
        """Whether it was a single sample, and its model inputs."""
        if isinstance(image, Mapping):
            raise ValueError(
                f"predict_action got a mapping of {', '.join(map(str, image))}: model inputs are given as "
                "predict_action(**inputs), of several cameras the one that the model was trained on."
            )
        if image is None:
            raise ValueError("No image given: OpenVLA acts on what it sees. Give predict_action(image, instruction).")
        if instruction is None:
            raise ValueError("No instruction given: say what to do, for example 'open the drawer'.")
        single = isinstance(instruction, str)
        instructions = [instruction] if single else instruction
        if not isinstance(instructions, (list, tuple)) or not instructions:
            raise ValueError(f"instruction must be a string or a list of strings, got {instruction!r}.")
        images = as_image_list(image)
        single = single and not is_image_list(image)
        if len(images) != len(instructions):
            raise ValueError(f"{len(images)} image(s) for {len(instructions)} instruction(s): give one for each.")
        prompts = self.processor.format_prompt(list(instructions))
        return single, self.processor(prompts, [load_image(entry) for entry in images], return_tensors="pt")

    def _check_model_inputs(self, input_ids, attention_mask, pixel_values) -> tuple[list[list[int]], torch.Tensor]:
        """Token ids of each prompt without padding, and pixel values; everything that can be wrong with them is said
        before the robot waits for an answer."""
        if pixel_values is None:
            raise ValueError("No image given (pixel_values is None): OpenVLA acts on what it sees.")
        config = self.config
        pad = None if config.pad_token_id == config.text_config.bos_token_id else config.pad_token_id
        if attention_mask is not None:
            attention_mask = as_tensor("attention_mask", attention_mask)
        prompts = prompt_rows(input_ids, attention_mask, pad)
        ids, vocabulary = [token for prompt in prompts for token in prompt], config.text_config.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(
                f"input_ids range from {min(ids)} to {max(ids)}, the model knows 0 to {vocabulary - 1}: was the prompt "
                "made with another model's processor?"
            )
        placeholders = {prompt.count(config.image_token_id) for prompt in prompts}
        if placeholders not in ({0}, {self.vision_backbone.num_patches}):
            raise ValueError(
                f"Prompts hold {sorted(placeholders)} image placeholders (id {config.image_token_id}): give each none, "
                f"or {self.vision_backbone.num_patches}."
            )
        for prompt in prompts:
            check_prompt_ids(prompt, config, warn_without_bos=True)
        pixel_values = as_tensor("pixel_values", pixel_values)
        channels = 3 * len(config.image_sizes)
        check_pixel_values(pixel_values, (len(prompts), channels, *self.vision_backbone.image_size))
        return prompts, pixel_values

    def _end_prompt(self, prompts, action_dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every row ends in the empty token `▁`, as in training; rows of unequal length are padded on the left.

        Returns the mask as None where no row is padded, which is also the fastest attention.
        """
        empty_token_id = self.config.empty_token_id
        if empty_token_id is None:
            empty_token_id = self.config.empty_token_id = self.processor.empty_token_id
        limit = self.config.llm_max_length
        positions = getattr(self.config.text_config, "max_position_embeddings", None)
        if positions is not None:
            limit = min(limit, positions - self.vision_backbone.num_patches - action_dim)
        if any(set(prompt) <= {self.config.text_config.bos_token_id, empty_token_id} for prompt in prompts):
            raise ValueError("No instruction given: a prompt holds no token but the start of the sequence.")
        longest = max(map(len, prompts))
        if longest + 1 > limit:
            raise ValueError(f"The prompt has {longest} tokens, the model takes {limit - 1}: shorten the instruction.")
        rows = [row if empty_token_id in (None, row[-1]) else [*row, empty_token_id] for row in prompts]
        length = max(map(len, rows))
        pad = self.config.pad_token_id or 0
        padded = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=self.device)
        if all(len(row) == length for row in rows):
            return padded, None
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return padded, mask

    def _decode_action_tokens(
        self, input_ids, attention_mask, pixel_values, num_tokens: int, *, constrained: bool, sampling: Sampling | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Autoregressive decoding of exactly `num_tokens` tokens; nothing leaves the device inside the loop.

        Args:
            input_ids: (batch, length) prompts, padded on the left.
            attention_mask: (batch, length), or None without padding.
            sampling: None for the most probable token.

        Returns:
            Token ids, their probabilities and the entropies (nats) of their distributions, each (batch, num_tokens).
            All probabilities of a sample are NaN if a feature or a logit of it is not finite: `check_finite` reads
            them on the host, where they go anyway.
        """
        features = self.encode_images(pixel_values.to(self.device))
        finite = features.isfinite().all(dim=(1, 2)).to(self.device)[:, None]  # (batch, 1)
        inputs_embeds, layout = self._merge(input_ids, None, attention_mask, features)
        position_ids = None
        if attention_mask is not None:
            attention_mask = attention_mask if layout is None else layout.insert(attention_mask, 1)
            attention_mask = nn.functional.pad(attention_mask, (0, num_tokens), value=1)
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        length = inputs_embeds.shape[1]
        first, end = self.action_tokenizer.token_range if constrained else (0, None)

        cache = DynamicCache(config=self.config.text_config)
        step_inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        begin, token_ids, probabilities, entropies = 0, [], [], []
        for step in range(num_tokens):
            stop = length + step
            logits = self.language_model(
                **step_inputs,
                attention_mask=None if attention_mask is None else attention_mask[:, :stop],
                position_ids=None if position_ids is None else position_ids[:, begin:stop],
                **{CACHE: cache},
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            finite = finite.to(logits.device) & logits.isfinite().all(dim=-1, keepdim=True)
            # Zeros instead of NaN, for which sampling on a GPU aborts the process.
            chosen, probability, entropy = choose_token(logits[:, first:end].masked_fill(~finite, 0.0), sampling)
            probabilities.append(probability)
            entropies.append(entropy)
            token_ids.append(chosen + first)
            step_inputs = {"input_ids": token_ids[-1]}
            begin = stop
        marked = torch.cat(probabilities, dim=1).masked_fill(~finite, torch.nan)
        return torch.cat(token_ids, dim=1), marked, torch.cat(entropies, dim=1)


__all__ = ["ActionPrediction", "OpenVLAForActionPrediction", "OpenVLAOutput", "OpenVLAPreTrainedModel"]

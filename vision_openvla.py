"""The vision towers and the projector: from pixel values to features in the embedding space of the language model.

Shapes: `batch` samples, `num_patches` image patches (256 at 224 pixels), `hidden` width of the language model. Names of
tensors are those of the published weights.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import LayerScale as TimmLayerScale
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .configuration_openvla import OpenVLAConfig
from .products_openvla import product_for
from .quantized_linear_openvla import type_of_inputs


class LayerScale(nn.Module):
    """timm's LayerScale with its parameter named as in the published files, `scale_factor` instead of `gamma`."""

    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.init_values = init_values
        self.scale_factor = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale_factor


class PatchProjection(nn.Conv2d):
    """The convolution that embeds patches, as the matrix product it is: its windows do not overlap.

    Forwards and backwards in bfloat16 on a CPU it takes a twelfth of the time, in float32 about as long (docs/LOG.md).
    """

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, dim, rows, columns); pixels that fill no patch are left out."""
        side = self.kernel_size[0]
        rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
        patches = pixels[:, :, : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (batch, rows, columns, 3 * side * side)
        weight = self.weight.flatten(1)
        return product_for(patches, weight, self.bias)(patches, weight, self.bias).permute(0, 3, 1, 2)


class LinspaceOnCPU(TorchFunctionMode):
    """timm before 1.0.21 reads the values of a linspace while it builds a tower: on the meta device, where models are
    built, there are none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))


# Blocks, patches and prefix tokens are alike; positions of the latter may be rotary.
TOWERS = (VisionTransformer, Eva)


def create_vision_tower(
    model_id: str, image_size: int, act_layer: str | None, model_kwargs: dict
) -> VisionTransformer | Eva:
    """One randomly initialized timm vision transformer; `model_kwargs` win over the other arguments."""
    made = timm.model_entrypoint(model_id) if timm.is_model(model_id) else None
    if getattr(made, "__annotations__", {}).get("return") is Eva:
        if act_layer is not None:
            raise ValueError(
                f"Vision tower '{model_id}': timm's Eva takes no act_layer, got {act_layer!r}: leave it out."
            )
        arguments: dict[str, Any] = {"dynamic_img_size": False}  # images have one size: positions are computed once
    else:
        arguments = {"act_layer": act_layer, "weight_init": "skip"}
    arguments |= {"img_size": image_size, "num_classes": 0, **model_kwargs}
    mode: AbstractContextManager[Any] = LinspaceOnCPU()
    if hasattr(timm.layers, "calculate_drop_path_rates"):
        mode = nullcontext()  # it costs a twentieth of the time of loading a small model
    try:
        with mode:
            tower = timm.create_model(model_id, pretrained=False, **arguments)
    except (TypeError, AttributeError, AssertionError, KeyError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"timm cannot build the vision tower '{model_id}' with {model_kwargs}: {error}. Towers are of timm's "
            "classes VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP) and Eva (DINOv3, EVA-02), not BEiT or Swin."
        ) from error
    if not isinstance(tower, TOWERS) or len(tower.blocks) < 2:
        raise ValueError(
            f"Vision tower '{model_id}' with {model_kwargs} must be a timm VisionTransformer or Eva of at least two "
            "blocks: features are read from the second-to-last."
        )
    for module in tower.modules():
        kept = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        unsaved = [tensor for tensor in module.buffers(recurse=False) if id(tensor) not in kept]
        if unsaved and not hasattr(module, "init_non_persistent_buffers"):
            raise ValueError(
                f"Vision tower '{model_id}': timm {timm.__version__} cannot compute again what its "
                f"{type(module).__name__} keeps in no file; a newer timm can: pip install -U timm."
            )
        if isinstance(module, EvaAttention):
            module.qkv_bias_separate = True  # its layer is called then, as adapters and quantized layers need it
    convolution = tower.patch_embed.proj
    tower.patch_embed.proj = PatchProjection(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        bias=convolution.bias is not None,
    )
    for block in tower.blocks:
        for name in ("ls1", "ls2"):
            layer_scale = getattr(block, name, None)
            if isinstance(layer_scale, TimmLayerScale):
                init_values = model_kwargs.get("init_values") or DEFAULT_LAYER_SCALE
                setattr(block, name, LayerScale(layer_scale.gamma.shape[0], init_values))
    # As `forward` and not under its own name: hooks that bring offloaded weights run where a module is called.
    tower.forward = partial(
        tower.forward_intermediates,
        indices=[len(tower.blocks) - 2],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC",
    )
    return tower


DEFAULT_LAYER_SCALE = 1e-5  # of timm's DINOv2


FILM = re.compile(r"\.blocks\.\d+\.(scale|shift)\.(weight|bias)$")  # names of its parameters in a tower


def add_film(tower: VisionTransformer | Eva, hidden: int) -> None:
    """Give every block of a tower the two projections of FiLM, from the words of the prompt to its features.

    In the last block, which no feature passes, as well: the files of OpenVLA-OFT hold them.
    """
    for block in tower.blocks:
        if not isinstance(block, Block):
            raise ValueError(
                f"use_film: a tower with blocks of timm's {type(block).__name__} has none, expected Block."
            )
        block.scale = nn.Linear(hidden, tower.embed_dim)
        block.shift = nn.Linear(hidden, tower.embed_dim)
        block.forward = partial(film_block, block)  # called as modules, with the hooks of sharding and offloading
    tower.forward = partial(film_features, tower)


def film_block(block: Block, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """A block of timm's with FiLM between its attention and its MLP (arXiv 2502.19645).

    Args:
        features: (images, tokens, dim), prefix tokens included.
        condition: (images, hidden).
    """
    features = features + block.drop_path1(block.ls1(block.attn(block.norm1(features))))
    condition = condition.to(type_of_inputs(block.scale, features.dtype))
    scale, shift = block.scale(condition)[:, None], block.shift(condition)[:, None]
    features = (features * (1 + scale) + shift).to(features.dtype)
    return features + block.drop_path2(block.ls2(block.mlp(block.norm2(features))))


def film_features(tower: VisionTransformer, pixels: torch.Tensor, condition: torch.Tensor) -> list[torch.Tensor]:
    """One (images, num_patches, dim) of a tower with FiLM, from its second-to-last block as without."""
    features = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(pixels))))
    for block in tower.blocks[:-1]:
        if tower.grad_checkpointing and torch.is_grad_enabled():
            features = checkpoint(block, features, condition, use_reentrant=False)
        else:
            features = block(features, condition)
    return [features[:, tower.num_prefix_tokens :]]


def _float_type(tower: VisionTransformer | Eva) -> torch.dtype:
    """In which a tower computes: that of parameters of its own, which are not packed where it is quantized, and keep
    their type where they are offloaded; one without positions and tokens of its own has the convolution's."""
    return next(tower.parameters(recurse=False), tower.patch_embed.proj.weight).dtype


_BESIDE: ContextVar[Any] = ContextVar("beside", default=None)


@contextmanager
def towers_beside(stream: Any) -> Iterator[None]:
    """Where the second tower computes on a CUDA stream of its own, beside the first one; None: after it."""
    before = _BESIDE.set(stream)
    try:
        yield
    finally:
        _BESIDE.reset(before)


@contextmanager
def _second_tower() -> Iterator[Callable[[], AbstractContextManager]]:
    """Where both towers compute: begins and ends on the current stream. Gives the place of the second one."""
    stream = _BESIDE.get()
    if stream is None:
        yield nullcontext
        return
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    yield partial(torch.cuda.stream, stream)
    current.wait_stream(stream)


class OpenVLAVisionBackbone(nn.Module):
    """One or two vision towers; the patch features of both are concatenated channel-wise."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        towers = [
            create_vision_tower(*arguments)
            for arguments in zip(
                config.timm_model_ids, config.image_sizes, config.timm_override_act_layers, config.timm_model_kwargs
            )
        ]
        self.featurizer = towers[0]
        if config.use_fused_vision_backbone:
            self.fused_featurizer = towers[1]
        self.use_fused_vision_backbone: bool = config.use_fused_vision_backbone  # published name
        self.embed_dim = sum(tower.embed_dim for tower in towers)
        self.num_patches: int = towers[0].patch_embed.num_patches
        self.image_size: tuple[int, int] = towers[0].patch_embed.img_size
        self.use_film = False
        if config.use_film:
            self.add_film(config.text_config.hidden_size)
        if any(tower.patch_embed.num_patches != self.num_patches for tower in towers):
            raise ValueError(
                f"Towers see {[tower.patch_embed.num_patches for tower in towers]} patches: their features can be "
                "concatenated only if image size and patch size agree."
            )

    def add_film(self, hidden: int) -> None:
        """Let the towers be modulated by the words of a prompt, whose embeddings are `hidden` wide."""
        for tower in self.towers:
            add_film(tower, hidden)
        self.use_film = True

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of the pixel values of one image: (3 * towers, height, width)."""
        return (3 * len(self.towers), *self.image_size)

    @property
    def towers(self) -> list[VisionTransformer | Eva]:
        return [getattr(self, name) for name in ("featurizer", "fused_featurizer") if hasattr(self, name)]

    @property
    def gradient_checkpointing(self) -> bool:
        """Switched by `model.gradient_checkpointing_enable()`, which looks for this name on every module."""
        return all(tower.grad_checkpointing for tower in self.towers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        for tower in self.towers:
            tower.set_grad_checkpointing(enable)

    def forward(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, cameras * 3 * towers, height, width) -> (batch, cameras * num_patches, embed_dim).

        Features are the output of the second-to-last block without final norm and without prefix tokens; the last block
        is not run.

        Args:
            condition: (batch, hidden), the mean embedding of the words of each prompt, of towers with FiLM.

        Raises:
            ValueError: If the pixels are no floats, or of another shape: those of another model's processor; or if
                there is a condition without FiLM, or FiLM without a condition.
        """
        if self.use_film != (condition is not None):
            raise ValueError(
                "The towers have FiLM and see the words of the prompt: such a model predicts in one pass, with its "
                "action head."
                if self.use_film
                else "The towers have no FiLM (config.use_film): leave condition out."
            )
        expected, found = self.input_shape, tuple(pixel_values.shape)
        fits = len(found) == 4 and found[1] and found[1] % expected[0] == 0 and found[2:] == expected[1:]
        if not fits or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} of shape {found}, expected normalized floats (batch, "
                f"{', '.join(map(str, expected))}) for each camera: make them with the processor of the model."
            )
        cameras = found[1] // expected[0]
        pixel_values = pixel_values.unflatten(1, (cameras, expected[0])).flatten(0, 1)
        towers = [
            (tower, pixels.to(_float_type(tower))) for tower, pixels in zip(self.towers, pixel_values.split(3, dim=1))
        ]
        features = []
        with _second_tower() as second:
            for number, (tower, pixels) in enumerate(towers):
                with second() if number else nullcontext():
                    features += (
                        tower(pixels) if condition is None else tower(pixels, condition.repeat_interleave(cameras, 0))
                    )
        return torch.cat(features, dim=2).unflatten(0, (-1, cameras)).flatten(1, 2)


class OpenVLAProjector(nn.Module):
    """MLP from patch features to the embedding space of the language model, three layers deep for two towers."""

    def __init__(self, vision_dim: int, hidden: int, fused: bool):
        super().__init__()
        if fused:
            self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
            self.fc2 = nn.Linear(4 * vision_dim, hidden)
            self.fc3 = nn.Linear(hidden, hidden)
        else:
            self.fc1 = nn.Linear(vision_dim, hidden)
            self.fc2 = nn.Linear(hidden, hidden)
            self.fc3 = None  # type: ignore[assignment]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, num_patches, vision_dim) -> (batch, num_patches, hidden)."""
        projected = self.fc2(nn.functional.gelu(self.fc1(features)))
        return projected if self.fc3 is None else self.fc3(nn.functional.gelu(projected))


class OpenVLAProprioProjector(nn.Module):
    """MLP from the robot's state to one position in the embedding space of the language model, after those of the
    images (arXiv 2502.19645)."""

    def __init__(self, proprio_dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        """(batch, proprio_dim), normalized, -> (batch, 1, hidden)."""
        return self.fc2(nn.functional.gelu(self.fc1(proprio)))[:, None]


@torch.no_grad()
def init_vision_weights(module: nn.Module) -> None:
    """Initialize what a module of the towers itself owns and transformers does not know.

    The library guards `torch.nn.init` while it calls this: tensors that were loaded keep their values.
    """
    if isinstance(module, TOWERS):
        # As timm initializes them; pos_embed, cls_token and reg_token belong to the tower itself.
        of_tokens = 1e-6 if isinstance(module, VisionTransformer) else 0.02
        for name, std in (("pos_embed", 0.02), ("cls_token", of_tokens), ("reg_token", of_tokens)):
            parameter = getattr(module, name, None)
            if parameter is not None:
                nn.init.normal_(parameter, std=std)
    elif isinstance(module, (EvaBlock, EvaBlockPostNorm, EvaAttention)) and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif callable(again := getattr(module, "init_non_persistent_buffers", None)):  # positions, which are in no file
        again()
    elif isinstance(module, AttentionPoolLatent):
        nn.init.trunc_normal_(module.latent, std=module.latent.shape[-1] ** -0.5)
        if module.pos_embed is not None:
            nn.init.trunc_normal_(module.pos_embed, std=module.pos_embed.shape[-1] ** -0.5)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.scale_factor, module.init_values)


__all__ = [
    "FILM",
    "TOWERS",
    "OpenVLAProjector",
    "OpenVLAProprioProjector",
    "OpenVLAVisionBackbone",
    "init_vision_weights",
    "towers_beside",
]

"""A small Diffusion Policy (arXiv 2303.04137) that is told what to do: networks, sampling, the policy of the loop.

As in the paper: a convolutional encoder with group norm and spatial softmax sees the image, and a 1-D U-Net,
conditioned by FiLM on what it saw, denoises a chunk of actions. Added: the words of the instruction, which the paper's
tasks do not have, steer the encoder (FiLM) and the U-Net. Matched to OpenVLA: one image, the same words, no
proprioception.

Shapes: B samples, T time steps of a chunk, D action dimensions that ever change.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import mish, relu
from transformers import PreTrainedTokenizerFast

from openvla.action_tokenizer import get_action_stats, unnormalize_actions
from openvla.choices_openvla import check_choice
from openvla.observation import Observation
from openvla.pixels_openvla import resize_lanczos3


CONFIG = "config.json"


@dataclass(frozen=True)
class DiffusionConfig:
    """The complete policy but for weights, words and units."""

    dims: tuple[int, ...]  # of the actions: those that ever change; the others keep their one value
    vocab_size: int
    pad_token_id: int
    image_size: int = 224  # a picture is resized to this
    crop_size: int = 208  # the part that is seen: random in training, the center afterwards
    patch_size: int = 4  # pixels on a side that the first convolution takes as one
    horizon: int = 8  # actions of a chunk
    encoder_widths: tuple[int, ...] = (32, 64, 128, 192)
    unet_widths: tuple[int, ...] = (128, 256, 384)
    text_width: int = 128
    diffusion_steps: int = 100
    # What the U-Net says: the noise ("epsilon"), or the actions without it ("sample"). Where there is little but noise,
    # small errors of the noise are large ones of the actions: after a short training "sample" is better.
    prediction: str = "sample"

    def __post_init__(self) -> None:
        halvings = 2 ** (len(self.unet_widths) - 1)
        if self.horizon < 1 or self.horizon % halvings:
            raise ValueError(f"horizon={self.horizon}: the U-Net takes multiples of {halvings}.")
        if not 0 < self.crop_size <= self.image_size:
            raise ValueError(f"crop_size={self.crop_size}: expected a part of the {self.image_size} pixels.")
        if self.patch_size < 1 or self.crop_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size}: expected a divisor of the {self.crop_size} pixels.")
        check_choice("prediction", self.prediction, ("epsilon", "sample"))

    def scheduler(self) -> dict[str, Any]:
        """Noise as in the paper, a squared cosine."""
        return {
            "num_train_timesteps": self.diffusion_steps,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": self.prediction,
            "clip_sample": True,
        }


# Encoder --------------------------------------------------------------------------------------------------------------


class ImageBlock(nn.Module):
    """Two convolutions around a shortcut; the instruction scales and shifts the channels in between."""

    def __init__(self, before: int, width: int, stride: int, text_width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(width // 16, width), nn.GroupNorm(width // 16, width)
        self.film = nn.Linear(text_width, 2 * width)
        nn.init.zeros_(self.film.weight)  # at first the words change nothing
        nn.init.zeros_(self.film.bias)
        same = before == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(text)[..., None, None].chunk(2, dim=1)
        hidden = relu(self.norm1(self.conv1(x)) * (1 + scale) + shift)
        return relu(self.shortcut(x) + self.norm2(self.conv2(hidden)))


class ImageEncoder(nn.Module):
    """A narrow ResNet on patches (P pixels on a side: all of the picture at the cost of a small one), in the end at a
    quarter of their resolution, then where in the image each channel is."""

    def __init__(self, widths: Sequence[int], text_width: int, patch_size: int):
        super().__init__()
        self.patches = nn.PixelUnshuffle(patch_size)
        self.stem = nn.Conv2d(3 * patch_size**2, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(widths[0] // 16, widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            blocks += [ImageBlock(before, width, 2 if stage == 1 else 1, text_width)]
            blocks += [ImageBlock(width, width, 1, text_width)]
            before = width
        self.blocks = nn.ModuleList(blocks)
        self.width = 2 * widths[-1]

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, text_width) -> (B, width)."""
        x = self.patches(images).contiguous(memory_format=torch.channels_last)
        x = self.pool(relu(self.norm(self.stem(x))))  # (B, widths[0], H/2P, W/2P)
        for block in self.blocks:
            x = block(x, text)  # (B, width, H/4P, W/4P) at the end
        return spatial_softmax(x)


def spatial_softmax(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, 2C): the expected position of each channel, x and y in [-1, 1]."""
    _, _, height, width = maps.shape
    share = maps.float().flatten(2).softmax(dim=-1).unflatten(2, (height, width))
    x = torch.linspace(-1, 1, width, device=maps.device)
    y = torch.linspace(-1, 1, height, device=maps.device)
    return torch.cat([(share.sum(2) * x).sum(-1), (share.sum(3) * y).sum(-1)], dim=1)


# U-Net ----------------------------------------------------------------------------------------------------------------


class ActionBlock(nn.Module):
    """Two convolutions over time around a shortcut, with FiLM in between."""

    def __init__(self, before: int, width: int, condition: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(before, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.film = nn.Linear(condition, 2 * width)
        self.shortcut = nn.Identity() if before == width else nn.Conv1d(before, width, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(mish(condition))[..., None].chunk(2, dim=1)
        hidden = mish(self.norm1(self.conv1(x))) * (1 + scale) + shift
        return self.shortcut(x) + mish(self.norm2(self.conv2(hidden)))


class ActionUNet(nn.Module):
    """From a noisy chunk of actions to the noise in it, or to the actions; every level but the last halves the time."""

    def __init__(self, dims: int, widths: Sequence[int], condition: int):
        super().__init__()
        self.time_width = widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], 4 * widths[0]), nn.Mish(), nn.Linear(4 * widths[0], widths[0]))
        condition += widths[0]
        befores = [dims, *widths[:-1]]
        self.down, self.shorter = nn.ModuleList(), nn.ModuleList()
        self.up, self.longer = nn.ModuleList(), nn.ModuleList()
        for before, width in zip(befores, widths):
            self.down.append(ActionBlock(before, width, condition))
            self.shorter.append(nn.Conv1d(width, width, 3, 2, 1))
        del self.shorter[-1]
        self.middle = ActionBlock(widths[-1], widths[-1], condition)
        for width, after in zip(widths[:0:-1], widths[-2::-1]):
            self.up.append(ActionBlock(2 * width, after, condition))
            self.longer.append(nn.ConvTranspose1d(after, after, 4, 2, 1))
        self.last = ActionBlock(2 * widths[0], widths[0], condition)
        self.out = nn.Conv1d(widths[0], dims, 1)

    def forward(self, chunk: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Noisy actions (B, T, D), diffusion times (B,) and (B, condition) -> what is predicted, (B, T, D)."""
        frequencies = torch.exp(
            -math.log(10_000) * torch.arange(self.time_width // 2, device=times.device) / (self.time_width // 2)
        )
        phases = times[:, None] * frequencies
        condition = torch.cat([self.time(torch.cat([phases.sin(), phases.cos()], dim=-1)), condition], dim=-1)
        x, kept = chunk.transpose(1, 2), []
        for level, block in enumerate(self.down):
            x = block(x, condition)
            kept.append(x)
            if level < len(self.shorter):
                x = self.shorter[level](x)
        x = self.middle(x, condition)
        for block, longer in zip(self.up, self.longer):
            x = longer(block(torch.cat([x, kept.pop()], dim=1), condition))
        return self.out(self.last(torch.cat([x, kept.pop()], dim=1), condition)).transpose(1, 2)


class DiffusionNetwork(nn.Module):
    """Both, and the words: their mean, as instructions are short."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.words = nn.EmbeddingBag(config.vocab_size, config.text_width, mode="mean", padding_idx=config.pad_token_id)
        # Normalized on either side: what tells two instructions apart is one word of several.
        width = config.text_width
        layers = [nn.LayerNorm(width), nn.Linear(width, width), nn.Mish(), nn.Linear(width, width), nn.LayerNorm(width)]
        self.text = nn.Sequential(*layers)
        self.encoder = ImageEncoder(config.encoder_widths, config.text_width, config.patch_size)
        condition = self.encoder.width + config.text_width
        self.unet = ActionUNet(len(config.dims), config.unet_widths, condition)

    def encode(self, images: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, crop, crop, 3) uint8 and padded tokens (B, L) -> (B, condition)."""
        text = self.text(self.words(input_ids))
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory, which is faster on a CPU
        return torch.cat([self.encoder(pixels, text), text.float()], dim=-1)

    @torch.inference_mode()
    def sample(
        self, images: torch.Tensor, input_ids: torch.Tensor, noise: torch.Tensor, steps: int = 10
    ) -> torch.Tensor:
        """Actions (B, T, D) in [-1, 1] from `noise` of that shape, by DDIM in so many steps; the same from the same."""
        from diffusers import DDIMScheduler  # not for --help

        scheduler = DDIMScheduler(**self.config.scheduler())
        scheduler.set_timesteps(steps)
        condition, chunk = self.encode(images, input_ids), noise
        for time in scheduler.timesteps:
            times = torch.full((len(chunk),), int(time), device=chunk.device)
            chunk = scheduler.step(self.unet(chunk, times, condition).float(), int(time), chunk).prev_sample
        return chunk.clamp(-1, 1)

    def training_scheduler(self) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(**self.config.scheduler())


# Policy ---------------------------------------------------------------------------------------------------------------


def token_ids(tokenizer: PreTrainedTokenizerFast, instructions: Sequence[str]) -> torch.Tensor:
    """Padded (N, L); lower-cased, as OpenVLA's prompt is."""
    return tokenizer([text.lower() for text in instructions], padding=True, return_tensors="pt").input_ids


class DiffusionPolicy:
    """For the control loop. What a chunk begins as is drawn from the picture's bytes: a policy without memory, whose
    answers hang neither on what else is in a batch nor on what came before.

    Args:
        stats: Statistics of the actions; all dimensions are scaled.
        execute: How many actions of a chunk are executed before the next is predicted.
        steps: Of DDIM.
        camera: Default: the first of the observation.
    """

    def __init__(
        self,
        network: DiffusionNetwork,
        tokenizer: PreTrainedTokenizerFast,
        stats: dict[str, Any],
        *,
        execute: int = 1,
        steps: int = 10,
        camera: str | None = None,
        seed: int = 0,
    ):
        config = network.config
        if not 1 <= execute <= config.horizon or not 1 <= steps <= config.diffusion_steps:
            raise ValueError(
                f"execute={execute}, steps={steps}: a chunk has {config.horizon} actions, noise is taken away in at "
                f"most {config.diffusion_steps} steps."
            )
        self.network, self.tokenizer, self.stats = network.eval(), tokenizer, stats
        self.execute, self.steps, self.camera, self.seed = execute, steps, camera, seed

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> "DiffusionPolicy":
        """From what `save` wrote; `options` of the class.

        Raises:
            FileNotFoundError: If the folder holds no finished policy.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"'{folder}' holds no Diffusion Policy ({CONFIG}): was its training finished?")
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = DiffusionConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        network = DiffusionNetwork(config)
        network.load_state_dict(load_file(folder / "model.safetensors"))
        stats = get_action_stats(json.loads((folder / "dataset_statistics.json").read_text(encoding="utf-8")), None)
        return cls(network, PreTrainedTokenizerFast.from_pretrained(folder), stats, **options)

    def save(self, folder: Path, name: str) -> None:
        """Weights, words, statistics under `name`, and last the configuration."""
        save_file({key: value.contiguous() for key, value in self.network.state_dict().items()}, folder / "model.part")
        (folder / "model.part").replace(folder / "model.safetensors")
        self.tokenizer.save_pretrained(folder)
        (folder / "dataset_statistics.json").write_text(json.dumps({name: {"action": self.stats}}, indent=2) + "\n")
        (folder / CONFIG).write_text(json.dumps(asdict(self.network.config), indent=2) + "\n")

    def __repr__(self) -> str:
        return (
            f"Diffusion Policy, {self.execute} of {self.network.config.horizon} actions, {self.steps} steps, "
            f"seed {self.seed}"
        )

    def _image(self, observation: Observation) -> np.ndarray:
        images, config = observation.images, self.network.config
        if self.camera is not None and self.camera not in images:
            raise ValueError(f"No camera '{self.camera}' in the observation; there are {', '.join(images)}.")
        image = resize_lanczos3(images[self.camera or next(iter(images))], (config.image_size, config.image_size))
        start = (config.image_size - config.crop_size) // 2
        return image[start : start + config.crop_size, start : start + config.crop_size]

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        """(N, A), or (N, execute, A) where several actions of a chunk are to be executed."""
        config = self.network.config
        images = np.stack([self._image(observation) for observation in observations])
        shape = (config.horizon, len(config.dims))
        noise = [np.random.default_rng([self.seed, zlib.crc32(image.tobytes())]).normal(size=shape) for image in images]
        ids = token_ids(self.tokenizer, [observation.instruction for observation in observations])
        start = torch.from_numpy(np.stack(noise).astype(np.float32))
        chunks = self.network.sample(torch.from_numpy(images), ids, start, self.steps)
        # What never changes is 0 in training, which the statistics turn into its value.
        actions = np.zeros((len(images), config.horizon, len(self.stats["q01"])))
        actions[..., list(config.dims)] = chunks.numpy()
        actions = unnormalize_actions(actions, self.stats)
        return actions[:, 0] if self.execute == 1 else actions[:, : self.execute]

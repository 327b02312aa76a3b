"""What OpenVLA is compared with: a Diffusion Policy of its size, trained on the same demonstrations, in the same loop.

    pip install -e '.[diffusion,sim,train]'
    python studies/diffusion_policy.py train data/mt10 --output outputs/diffusion --steps 8550
    python studies/diffusion_policy.py evaluate outputs/diffusion --output runs/diffusion --episodes 50

Training continues from its last checkpoint when the same command is given again. Evaluation writes the report of
`openvla evaluate`, from the same seeds. `diffusion_networks.py` says what the policy is.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusion_networks import DiffusionConfig, DiffusionNetwork, DiffusionPolicy, token_ids
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from openvla.data.samples import main_camera
from openvla.data.source import Source
from openvla.data.sources import open_source
from openvla.evaluation.evaluate import evaluate
from openvla.pixels_openvla import resize_lanczos3


ROOT = Path(__file__).resolve().parents[1]
ACTION_DIM = 7
CHECKPOINT, FRAMES = "checkpoint.pt", "frames"
FREE_ON_RESUME = ("output", "save_every", "threads")
HELD_OUT_FRAMES = 256


# Demonstrations -------------------------------------------------------------------------------------------------------


@dataclass
class Frames:
    """All frames of some episodes, decoded."""

    images: np.ndarray  # (N, size, size, 3) uint8
    chunks: torch.Tensor  # (N, T, D) float32 in [-1, 1]
    words: torch.Tensor  # (N, L) padded tokens

    def __len__(self) -> int:
        return len(self.images)


def read_frames(
    source: Source, tokenizer: PreTrainedTokenizerFast, config: DiffusionConfig, folder: Path, held_out: bool = False
) -> Frames:
    """Of the episodes to train on, or of those held out. They stay in `folder` until the run is done: 90,000 of 224
    pixels are 14 GB, more than many machines have as memory."""
    kind = "held_out" if held_out else "train"
    file, rest = folder / f"{kind}.npy", folder / f"{kind}.pt"
    if not rest.exists():
        size = (config.image_size, config.image_size)
        folder.mkdir(parents=True, exist_ok=True)
        # More than comes: the file takes as much of the disk as is written.
        images = np.lib.format.open_memmap(file, "w+", np.uint8, (source.num_frames, *size, 3))
        chunks, instructions = [], []
        for episode in tqdm(source.held_out or () if held_out else source.dataset, desc="reading", unit="episode"):
            for frame in source.frames(episode, config.horizon):
                images[len(chunks)] = resize_lanczos3(frame.images[main_camera(frame)][0], size)
                chunks.append(frame.actions[:, list(config.dims)])
                instructions.append(frame.instruction)
        images.flush()
        different = sorted(set(instructions))
        rows = torch.tensor([different.index(text) for text in instructions], dtype=torch.long)
        words = token_ids(tokenizer, different)[rows] if different else torch.zeros(0, 1, dtype=torch.long)
        shape = (len(chunks), config.horizon, len(config.dims))
        found = {"chunks": torch.from_numpy(np.array(chunks, dtype=np.float32).reshape(shape)), "words": words}
        torch.save(found, rest.with_suffix(".part"))
        rest.with_suffix(".part").replace(rest)
    found = torch.load(rest, weights_only=True)
    return Frames(np.load(file, mmap_mode="r")[: len(found["chunks"])], **found)


def order(count: int, batch_size: int, start: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the batches from step `start` on: every frame once before any comes again."""
    step = start
    while True:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = {e: np.random.default_rng([seed, e]).permutation(count) for e in set(positions // count)}
        yield np.array([epochs[position // count][position % count] for position in positions])
        step += 1


def crop(images: np.ndarray, size: int, generator: np.random.Generator | None = None) -> torch.Tensor:
    """(B, size, size, 3) uint8: the center, or a part that is drawn for each image."""
    room = images.shape[1] - size
    corners = np.full((len(images), 2), room // 2)
    if generator is not None:
        corners = generator.integers(0, room + 1, (len(images), 2))
    parts = [image[top : top + size, left : left + size] for image, (top, left) in zip(images, corners)]
    return torch.from_numpy(np.stack(parts))


# Training -------------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> DiffusionPolicy:
    """The policy with averaged weights, as it is written to `arguments.output`.

    Raises:
        ValueError: If the folder holds a run with other options, or actions are not those of this project.
    """
    if min(arguments.steps, arguments.batch_size, arguments.noises, arguments.save_every) < 1:
        raise ValueError("steps, batch size, noises and save-every: expected at least 1 each.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    source = open_source(arguments.dataset, mask=[True] * ACTION_DIM, held_out=arguments.held_out)
    stats = source.statistics["action"]
    dims = tuple(i for i, (low, high) in enumerate(zip(stats["min"], stats["max"])) if low != high)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.tokenizer)
    sizes = {name: getattr(arguments, name) for name in ("image_size", "crop_size", "patch_size", "horizon")}
    config = DiffusionConfig(dims, len(tokenizer), tokenizer.pad_token_id, prediction=arguments.prediction, **sizes)
    network = DiffusionNetwork(config).to(memory_format=torch.channels_last)
    print(f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}M parameters; {source.report()}")

    from diffusers.training_utils import EMAModel  # not for --help

    # Those of the paper but for the rate, which is higher as the run is short.
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=arguments.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, arguments.steps // 10), arguments.steps)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in vars(arguments).items() if name not in (*FREE_ON_RESUME, "run")}
    learning = {"network": network, "optimizer": optimizer, "schedule": schedule, "average": average}
    begun = load_checkpoint(folder / CHECKPOINT, learning, options)
    if begun == arguments.steps:
        return finished(folder)
    if not begun:  # before the first frame is read: they are those of these options
        save_checkpoint(folder / CHECKPOINT, learning, options, 0)
    frames = read_frames(source, tokenizer, config, folder / FRAMES)
    others = read_frames(source, tokenizer, config, folder / FRAMES, held_out=True)
    scheduler = network.training_scheduler()
    batches = order(len(frames), arguments.batch_size, begun, arguments.seed)
    network.train()
    started, losses = time.perf_counter(), []
    bar = tqdm(range(begun, arguments.steps), initial=begun, total=arguments.steps, unit="step")
    for step in bar:
        # All that is drawn depends on the step: a resumed run is the same as one that was not stopped.
        rng = np.random.default_rng([arguments.seed, step, 1])
        indices = next(batches)
        images = crop(frames.images[indices], config.crop_size, rng)
        with torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else nullcontext():
            seen = network.encode(images, frames.words[indices])
            # Several noises for each image: the encoder is most of the work.
            seen = seen.repeat_interleave(arguments.noises, dim=0)
            chunks = frames.chunks[indices].repeat_interleave(arguments.noises, dim=0)
            noise = torch.from_numpy(rng.standard_normal(chunks.shape, dtype=np.float32))
            times = torch.from_numpy(rng.integers(0, config.diffusion_steps, len(chunks)))
            found = network.unet(scheduler.add_noise(chunks, noise, times), times, seen)
        loss = mse_loss(found.float(), noise if config.prediction == "epsilon" else chunks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        losses.append(loss.item())
        done = step + 1
        if done % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if done % arguments.save_every == 0 or done == arguments.steps:
            average.store(network.parameters())
            average.copy_to(network.parameters())
            entry = {"step": done, "loss": float(np.mean(losses[-arguments.save_every :]))}
            entry |= {"l1_held_out": first_action_error(network.eval(), others)} if len(others) else {}
            entry["samples_per_second"] = (done - begun) * arguments.batch_size / (time.perf_counter() - started)
            if done == arguments.steps:
                policy = DiffusionPolicy(network, tokenizer, stats)
                policy.save(folder, source.name)
            average.restore(network.parameters())
            network.train()
            save_checkpoint(folder / CHECKPOINT, learning, options, done)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            bar.write(", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    return finished(folder)


def finished(folder: Path) -> DiffusionPolicy:
    """The policy of a run that is done; its frames go."""
    shutil.rmtree(folder / FRAMES, ignore_errors=True)
    return DiffusionPolicy.load(folder)


def first_action_error(network: DiffusionNetwork, frames: Frames) -> float:
    """Mean absolute error of the first action of a chunk, in units where the range of the data is [-1, 1], on frames
    spread evenly. A sample of what the data does at random has an error even where the policy is right."""
    indices = np.unique(np.linspace(0, len(frames) - 1, HELD_OUT_FRAMES).astype(int))
    errors = []
    for part in np.array_split(indices, max(1, len(indices) // 32)):
        wanted = frames.chunks[part]
        noise = np.random.default_rng(part).standard_normal(wanted.shape, dtype=np.float32)
        images = crop(frames.images[part], network.config.crop_size)
        found = network.sample(images, frames.words[part], torch.from_numpy(noise))
        errors.append((found - wanted)[:, 0].abs())
    return float(torch.cat(errors).mean())


def save_checkpoint(path: Path, learning: dict, options: dict, step: int) -> None:
    """Appears complete or not at all."""
    state = {name: part.state_dict() for name, part in learning.items()}
    torch.save({**state, "step": step, "options": json.dumps(options)}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, learning: dict, options: dict) -> int:
    """The step to continue from; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    before = json.loads(state["options"])
    changed = [f"{k} was {before.get(k)!r}, is {options.get(k)!r}" for k in options if before.get(k) != options[k]]
    if changed:
        raise ValueError(f"'{path}' is of another run: {'; '.join(changed)}. Choose another --output.")
    for name, part in learning.items():
        part.load_state_dict(state[name])
    return int(state["step"])


# Command line ---------------------------------------------------------------------------------------------------------


def run_evaluation(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    policy = DiffusionPolicy.load(
        arguments.policy, execute=arguments.execute, steps=arguments.denoising_steps, seed=arguments.seed
    )
    options = {"camera": arguments.camera} if arguments.camera else {}
    summary = evaluate(
        policy=policy,
        model=arguments.policy,
        output=arguments.output,
        env=arguments.env,
        tasks=arguments.tasks,
        episodes=arguments.episodes,
        axis=arguments.axis,
        max_steps=arguments.max_steps,
        workers=arguments.workers,
        videos=arguments.videos,
        **options,
    )
    rate = summary["mean_success"]
    print(f"wrote {arguments.output}; mean success {'unknown' if rate is None else f'{rate:.1%}'}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    training = commands.add_parser(
        "train", help="train it on demonstrations", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    training.set_defaults(run=train)
    training.add_argument("dataset", help="demonstrations, for example what `openvla record` wrote")
    training.add_argument("--output", required=True, help="folder for checkpoints and result")
    training.add_argument("--steps", type=int, default=8550, help="updates of the weights")
    training.add_argument("--batch-size", type=int, default=64, help="images of one update")
    training.add_argument("--noises", type=int, default=2, help="noisy chunks of each image of a batch")
    training.add_argument("--image-size", type=int, default=224, help="width and height that images are resized to")
    training.add_argument("--crop-size", type=int, default=208, help="width and height of the part that is seen")
    training.add_argument("--patch-size", type=int, default=4, help="pixels that the first convolution takes as one")
    training.add_argument("--horizon", type=int, default=8, help="actions of a chunk")
    training.add_argument(
        "--prediction",
        choices=["epsilon", "sample"],
        default="sample",
        help="what the U-Net predicts: noise (epsilon) or actions",
    )
    training.add_argument(
        "--learning-rate",
        type=float,
        default=5e-4,
        help="largest learning rate; falls as a cosine after a short warmup",
    )
    training.add_argument("--held-out", type=float, default=0.05, help="part of the episodes, as in `openvla finetune`")
    training.add_argument("--tokenizer", default=str(ROOT), help="folder (default: that of the embedded policy)")
    training.add_argument("--precision", choices=["bf16", "float32"], default="bf16", help="type of the computation")
    training.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")
    training.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    trial = commands.add_parser(
        "evaluate", help="measure it in the closed loop", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    trial.set_defaults(run=run_evaluation)
    trial.add_argument("policy", help="output of train")
    trial.add_argument("--output", required=True, help="folder for episodes, report and videos")
    trial.add_argument("--env", default="metaworld", help="simulator")
    trial.add_argument("--tasks", default="mt10", help="tasks and sets of them, joined by commas")
    trial.add_argument("--episodes", type=int, default=50, help="episodes of each task")
    trial.add_argument("--axis", default="", help="variations of the environment, joined by commas")
    trial.add_argument("--execute", type=int, default=1, help="actions of a chunk before the next is predicted")
    trial.add_argument("--denoising-steps", type=int, default=10, help="steps of DDIM in one prediction")
    trial.add_argument("--camera", help="camera of the simulator; default: its own")
    trial.add_argument("--max-steps", type=int, help="after which an episode has failed; default: the simulator's")
    trial.add_argument("--workers", type=int, help="environments side by side; default: cores")
    trial.add_argument("--videos", type=int, default=1, help="episodes of each task to record as videos")
    trial.add_argument("--seed", type=int, default=0, help="seed of the noise that chunks begin as")
    trial.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    return parser.parse_args(words)


if __name__ == "__main__":
    arguments = parse()
    arguments.run(arguments)

"""Train the embedded policy: a small OpenVLA from scratch on a LeRobot v3 dataset, on a CPU in half an hour.

    python examples/train_policy.py DATASET OUT            # DATASET: a LeRobot v3 folder with one video camera

Writes a checkpoint, processor and statistics to OUT and prints, for training and held-out episodes, the mean L1 of the
normalized actions that `predict_action` gives, beside that of predicting the mean action.
"""

import argparse
import json
import math
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import torch
from fresh_policy import make_tokenizer
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import openvla


CAMERA = "observation.images.image"
# Words the tokenizer should know as one piece; anything else is spelled in characters and bytes.
CORPUS = """
pick up place put push pull open close press turn slide insert lift move stack pour wipe reach lock unlock pick and place
the a an to on in into from of with next behind front left right top bottom above below side goal target position slot
drawer door window button lever handle faucet dial knob coffee mug cup plate bowl block cube puck ball box bin shelf peg
nut hammer nail stick basket hoop soccer table towel spoon pot cloth red green blue yellow black white silver orange
What action should the robot take to open the drawer?
"""  # noqa: E501


def make_config(tokenizer: PreTrainedTokenizerFast, norm_stats: dict) -> openvla.OpenVLAConfig:
    """Both towers with 64 patches of 28 pixels, the three-layer projector, Llama: 5M parameters."""
    tower = {"patch_size": 28, "embed_dim": 128, "depth": 5, "num_heads": 4, "mlp_ratio": 4}
    vocabulary = tokenizer.vocab_size
    return openvla.OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp",
        image_resize_strategy="resize-naive",
        # LayerScale begins at 0.1: from the 1e-5 of DINOv2 a short training would hardly open the blocks.
        timm_model_kwargs=[{**tower, "init_values": 0.1}, {**tower, "global_pool": ""}],
        text_config={
            "vocab_size": vocabulary + 64, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id,
        },  # fmt: skip
        llm_max_length=256,
        pad_token_id=tokenizer.pad_token_id,
        empty_token_id=tokenizer.convert_tokens_to_ids("▁"),
        norm_stats=norm_stats,
    )  # fmt: skip


def read_dataset(folder: Path) -> tuple[list[Image.Image], np.ndarray, np.ndarray, list[str]]:
    """Frames, actions (N, 7), episode of each frame (N,) and instruction of each frame, in the order of the dataset."""
    info = json.loads((folder / "meta/info.json").read_text())
    table = pq.read_table(sorted((folder / "data").rglob("*.parquet")))
    tasks = {
        row["task_index"]: row["__index_level_0__"] for row in pq.read_table(folder / "meta/tasks.parquet").to_pylist()
    }
    frames = []
    for video in sorted((folder / "videos" / CAMERA).rglob("*.mp4")):
        with av.open(str(video)) as container:
            frames += [frame.to_image() for frame in container.decode(video=0)]
    if not len(frames) == table.num_rows == info["total_frames"]:
        raise ValueError(f"{folder}: {len(frames)} frames, {table.num_rows} rows, {info['total_frames']} announced.")
    actions = np.array(table["action"].to_pylist(), dtype=np.float64)
    return frames, actions, table["episode_index"].to_numpy(), [tasks[task] for task in table["task_index"].to_pylist()]


def statistics(actions: np.ndarray, episodes: np.ndarray) -> dict:
    """The published form; the gripper is already in [0, 1] and passes unscaled, as in the published datasets."""
    action = {
        "mean": actions.mean(0), "std": actions.std(0), "min": actions.min(0), "max": actions.max(0),
        "q01": np.quantile(actions, 0.01, axis=0), "q99": np.quantile(actions, 0.99, axis=0),
    }  # fmt: skip
    action = {name: values.tolist() for name, values in action.items()}
    action["mask"] = [True] * (actions.shape[1] - 1) + [False]
    return {"action": action, "num_transitions": len(actions), "num_trajectories": len(np.unique(episodes))}


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1]: shifted by up to 4 pixels, brightness and contrast changed by up to 20%."""
    batch, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4), mode="replicate")
    shifts = torch.randint(0, 9, (batch, 2), generator=generator).tolist()
    pixels = torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, shifts)])
    brightness, contrast = (torch.rand(2, batch, 1, 1, 1, generator=generator) - 0.5) * 0.4
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return ((pixels - mean) * (1 + contrast) + mean * (1 + brightness)).clamp(0, 1)


def mean_l1(model, frames, instructions, targets: np.ndarray, batch_size: int = 64) -> float:
    """Mean over steps and dimensions of |predicted - target|, both normalized."""
    predicted = [
        model.predict_action(
            frames[start : start + batch_size], instructions[start : start + batch_size], return_dict=True
        ).normalized_actions
        for start in range(0, len(frames), batch_size)
    ]
    return float(np.abs(np.concatenate(predicted) - targets).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="LeRobot v3 folder")
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--name", default="metaworld_demo", help="dataset name in the statistics (the unnorm_key)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (cosine schedule)")
    parser.add_argument("--held-out", type=int, default=5, help="keep every n-th episode for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)

    frames, actions, episodes, instructions = read_dataset(arguments.dataset)
    held_out = episodes % arguments.held_out == arguments.held_out - 1
    stats = statistics(actions[~held_out], episodes[~held_out])
    targets = openvla.normalize_actions(actions, stats["action"])  # (N, 7) in [-1, 1]

    tokenizer = make_tokenizer(CORPUS.strip().splitlines(), pieces_learned=600)
    image_processor = openvla.OpenVLAImageProcessor(
        use_fused_vision_backbone=True, image_resize_strategy="resize-naive", input_sizes=[[3, 224, 224]] * 2,
        means=[[0.485, 0.456, 0.406], [0.5] * 3], stds=[[0.229, 0.224, 0.225], [0.5] * 3],
    )  # fmt: skip
    processor = openvla.OpenVLAProcessor(image_processor, tokenizer)
    model = openvla.OpenVLAForActionPrediction(make_config(tokenizer, {arguments.name: stats}))
    model.processor = processor
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(frames)} frames, {held_out.sum()} held out")

    plain = image_processor(frames, do_normalize=False, return_tensors="pt")["pixel_values"][:, :3]
    means, stds = (torch.tensor(values).view(1, 6, 1, 1) for values in
                   (sum(image_processor.means, []), sum(image_processor.stds, [])))  # fmt: skip
    prompts = [
        tokenizer(prompt)["input_ids"] + [model.config.empty_token_id]
        for prompt in processor.format_prompt(list(instructions))
    ]
    answers = model.action_tokenizer.encode(targets)  # (N, 7)

    train = np.flatnonzero(~held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05, betas=(0.9, 0.98))
    steps = arguments.epochs * math.ceil(len(train) / arguments.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(total=steps, unit="step", mininterval=5)
    for _ in range(arguments.epochs):
        model.train()
        order = train[torch.randperm(len(train), generator=generator).numpy()]
        for start in range(0, len(order), arguments.batch_size):
            batch = order[start : start + arguments.batch_size]
            rows = [prompts[i] + answers[i].tolist() + [tokenizer.eos_token_id] for i in batch]
            length = max(map(len, rows))
            input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
            labels = torch.full_like(input_ids, -100)
            for index, row in enumerate(rows):  # loss on the action tokens and </s> only
                labels[index, len(row) - actions.shape[1] - 1 : len(row)] = torch.tensor(row[-actions.shape[1] - 1 :])
            pixel_values = (augment(plain[batch], generator).repeat(1, 2, 1, 1) - means) / stds
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids, mask, pixel_values, labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()

    # Stored in bfloat16 to keep the repository small, computed in float32; rounded here so that what is measured is
    # what is stored.
    model.eval().to(torch.bfloat16).to(torch.float32)
    for name, chosen in (("training", ~held_out), ("held-out", held_out)):
        index = np.flatnonzero(chosen)
        l1 = mean_l1(model, [frames[i] for i in index], [instructions[i] for i in index], targets[index])
        baseline = float(np.abs(targets[index] - targets[~held_out].mean(0)).mean())
        print(f"{name}: mean L1 of the normalized action {l1:.4f}; of the mean action {baseline:.4f}")
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    config = json.loads((arguments.output / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()

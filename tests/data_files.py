"""Small files of demonstrations, made for a test."""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from openvla.data.tfrecord import masked_crc


def picture(red: int, green: int, mode: str = "RGB") -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.full((8, 8), red, np.uint16))
    image = Image.new("RGB", (8, 8), (red, green, 0))
    return image.convert(mode) if mode != "L" else Image.new("L", (8, 8), red)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png(red: int, green: int, mode: str = "RGB") -> bytes:
    return encoded(picture(red, green, mode), "PNG")


def jpeg(level: int, mode: str = "RGB") -> bytes:
    return encoded(picture(level, level, mode), "JPEG")


def write_records(path: Path, records: Sequence[bytes]) -> None:
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            for part in (length, record):
                file.write(part + struct.pack("<I", masked_crc(part)))


def write_rlds(folder: Path, steps: dict[str, Any], episodes: Sequence[list], shards: Sequence[int]) -> Path:
    """A TFDS folder with a split "train"; encoded images in `episodes` stay as they are."""
    folder.mkdir(parents=True)
    name = folder.parent.name
    tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)}).save_config(folder)
    remaining = [_serialize(steps, episode) for episode in episodes]
    for number, count in enumerate(shards):
        path = folder / f"{name}-train.tfrecord-{number:05d}-of-{len(shards):05d}"
        write_records(path, remaining[:count])
        remaining = remaining[count:]
    assert not remaining
    split = {
        "name": "train",
        "shardLengths": [str(count) for count in shards],
        "numBytes": "1",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": name, "version": folder.name, "fileFormat": "tfrecord", "moduleName": "x", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def own_rlds(folder: Path, **observation) -> Path:
    """Own recordings with a gripper of 1 = open, in a folder of any name."""
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg")
    state = tfds.features.Tensor(shape=(8,), dtype=np.float32)
    steps = {
        "observation": observation or {"image": image, "wrist_image": image, "state": state},
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
    }
    one = {
        "observation": {key: np.zeros(8, np.float32) if key == "state" else jpeg(1) for key in steps["observation"]},
        "language_instruction": "open it",
    }
    episode = [{**one, "action": np.float32([0.1 * step] * 6 + [step < 3])} for step in range(6)]
    return write_rlds(folder / "1.0.0", steps, [episode] * 3, shards=(3,))


def _serialize(steps: dict[str, Any], episode: list) -> bytes:
    """tensorflow_datasets reads lists of texts within steps without TensorFlow, but writes them with it only: these
    (`hints` of an observation) are put into the finished record here, in its ragged form."""
    plain = {k: {i: f for i, f in v.items() if i != "hints"} if isinstance(v, dict) else v for k, v in steps.items()}
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(plain)})
    hints = [step["observation"].pop("hints") for step in episode if "hints" in step.get("observation", {})]
    record = features.serialize_example({"steps": _open_images(episode)})
    if not hints:
        return record
    example = tf_example_pb2.Example.FromString(record)
    key = "steps/observation/hints/ragged_"
    values = [text.encode() for texts in hints for text in texts]
    example.features.feature[f"{key}flat_values"].bytes_list.value.extend(values)
    example.features.feature[f"{key}row_lengths_0"].int64_list.value.extend(len(texts) for texts in hints)
    return example.SerializeToString()


def _open_images(tree: Any) -> Any:
    """tensorflow_datasets takes encoded images as file objects."""
    if isinstance(tree, dict):
        return {key: _open_images(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_open_images(value) for value in tree]
    return io.BytesIO(tree) if isinstance(tree, bytes) else tree


def write_video(path: Path, pictures: Sequence[np.ndarray], codec: str, rate: int, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())

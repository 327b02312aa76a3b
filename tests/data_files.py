"""Small files of demonstrations, made for a test."""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from openvla.data.formats.tfrecord import masked_crc
from openvla.data.writers.lerobot import tasks_table


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


def write_rlds(
    folder: Path,
    steps: dict[str, Any],
    episodes: Sequence[list],
    shards: Sequence[int],
    metadata: dict[str, list[str]] | None = None,
) -> Path:
    """A TFDS folder with a split "train"; encoded images in `episodes` stay as they are. `metadata`: texts of each."""
    folder.mkdir(parents=True)
    name = folder.parent.name
    about = {"episode_metadata": {key: tfds.features.Text() for key in metadata}} if metadata else {}
    tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps), **about}).save_config(folder)
    notes = [{key: texts[number] for key, texts in (metadata or {}).items()} for number in range(len(episodes))]
    remaining = [_serialize(steps, episode, note, about) for episode, note in zip(episodes, notes)]
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


def _serialize(steps: dict[str, Any], episode: list, note: dict[str, str], about: dict[str, Any]) -> bytes:
    """tensorflow_datasets reads lists of texts within steps without TensorFlow, but writes them with it only: these
    (`hints` of an observation) are put into the finished record here, in its ragged form."""
    plain = {k: {i: f for i, f in v.items() if i != "hints"} if isinstance(v, dict) else v for k, v in steps.items()}
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(plain), **about})
    hints = [step["observation"].pop("hints") for step in episode if "hints" in step.get("observation", {})]
    whole = {"episode_metadata": note} if note else {}
    record = features.serialize_example({"steps": _open_images(episode), **whole})
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


FRONT = "observation.images.front"


def level(number: int) -> int:
    """Gray of frame `number` in the videos of `write_lerobot`."""
    return 8 * number + 8


def write_lerobot(
    folder: Path,
    version: str = "v3.0",
    episodes: int = 2,
    steps: int = 6,
    fps: int = 10,
    video_fps: int | None = None,
    info: dict[str, Any] | None = None,
) -> Path:
    """A LeRobot folder with one video of all episodes (v3.0) or one for each (v2.1); frame n of all has `level(n)`."""
    v3 = version.startswith("v3")
    place = {"data": "data/chunk-000/file-000.parquet", "video": f"videos/{FRONT}/chunk-000/file-000.mp4"}
    if not v3:
        place = {
            "data": "data/chunk-000/episode_{:06d}.parquet",
            "video": f"videos/chunk-000/{FRONT}/episode_{{:06d}}.mp4",
        }
    tables, rows, films = [], [], []
    for number in range(episodes):
        first = number * steps
        count = np.arange(steps)
        columns = {
            "action": pa.array((np.full((steps, 7), number) + count[:, None] / 10).tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array(count / fps, pa.float32()),
            "frame_index": count,
            "episode_index": np.full(steps, number),
            "task_index": np.full(steps, number % 2),
        }
        tables.append(pa.table(columns))
        films.append([np.full((32, 32, 3), level(first + step), np.uint8) for step in range(steps)])
        row = {"episode_index": number, "tasks": [["open it", "close it"][number % 2]], "length": steps}
        spot = {"chunk_index": 0, "file_index": 0}
        if v3:
            row |= {f"data/{key}": value for key, value in spot.items()}
            row |= {f"videos/{FRONT}/{key}": value for key, value in spot.items()}
            row |= {
                f"videos/{FRONT}/from_timestamp": first / fps,
                f"videos/{FRONT}/to_timestamp": (first + steps) / fps,
            }
        rows.append(row)
    for room in (place["data"], place["video"], "meta/episodes/chunk-000/x"):
        (folder / room).parent.mkdir(parents=True, exist_ok=True)
    if v3:
        tables, films = [pa.concat_tables(tables)], [[picture for film in films for picture in film]]
        pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(tasks_table(["open it", "close it"]), folder / "meta/tasks.parquet")
    else:
        lines = [{"task_index": index, "task": task} for index, task in enumerate(["open it", "close it"])]
        for name, content in (("episodes", rows), ("tasks", lines)):
            (folder / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    for number, (table, film) in enumerate(zip(tables, films)):
        pq.write_table(table, folder / place["data"].format(number), write_page_checksum=True)
        write_video(folder / place["video"].format(number), film, "libx264", video_fps or fps, {"crf": "5"})
    numbers = {key: {"dtype": "int64", "shape": [1]} for key in ("frame_index", "episode_index", "task_index")}
    about = {
        "codebase_version": version,
        "total_episodes": episodes,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [7]},
            FRONT: {"dtype": "video", "shape": [32, 32, 3], "info": {"video.is_depth_map": False}},
            "timestamp": {"dtype": "float32", "shape": [1]},
            **numbers,
        },
    }
    (folder / "meta/info.json").write_text(json.dumps(about | (info or {})))
    return folder

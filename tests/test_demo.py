"""The demo: videos of episodes, all of them in one GIF, and what it says where nothing can be rendered."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from openvla.cli import app
from openvla.evaluation import demo as demo_module
from openvla.evaluation.demo import demo
from openvla.evaluation.rendering import NoOpenGL
from openvla.evaluation.video import (
    GREEN,
    RED,
    EpisodeVideo,
    Film,
    check_replaceable,
    draw,
    draw_tile,
    read_film,
    save_tiles,
    wrap,
)
from openvla.observation import Observation


def film(length: int, success: bool) -> Film:
    """A white bar wanders over gray: a GIF joins frames that are the same."""
    pictures = [Image.new("RGB", (48, 48), "gray") for _ in range(length)]
    for step, picture in enumerate(pictures):
        picture.paste("white", (step * 6 % 48, 12, step * 6 % 48 + 6, 36))
    return Film(pictures, "push the puck to the goal", success)


def test_all_episodes_are_side_by_side_until_the_longest_has_ended(tmp_path):
    save_tiles([film(4, True), film(12, False), film(8, True)], tmp_path / "demo.gif", columns=2, size=40)
    with Image.open(tmp_path / "demo.gif") as gif:
        assert gif.size == (2 * 42, 2 * (40 + 27 + 2)) and gif.n_frames == 12 + 1
        shown = []
        for index in range(gif.n_frames):
            gif.seek(index)
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
        assert gif.info["duration"] == 2000 and gif.info["loop"] == 0
    corners = {"short": (2, 2), "failed": (2, 44), "below": (71, 2)}  # in the border of each tile
    for name, (last, color) in {"short": (3, GREEN), "failed": (11, RED), "below": (7, GREEN)}.items():
        for index, picture in enumerate(shown):
            framed = np.abs(picture[corners[name]] - color).max() < 12
            assert framed == (index > last), (name, index)


def test_long_episodes_are_thinned_not_cut(tmp_path):
    save_tiles([film(150, True)], tmp_path / "demo.gif", size=40)
    with Image.open(tmp_path / "demo.gif") as gif:
        assert gif.n_frames == 50 + 1 and gif.info["duration"] == 150  # every third, three times as long


def test_captions_are_lines_of_whole_words():
    assert wrap("push the puck to the goal", lambda text: len(text) <= 8) == ["push the", "puck to", "the goal"]
    assert wrap("unbreakable", lambda text: False) == ["unbreakable"] and wrap("", len) == []
    picture = Image.new("RGB", (112, 112), "white")
    long = draw_tile(picture, "press the button from above, then press it again", None)
    rows = np.flatnonzero((np.asarray(long) < 128).any(axis=(1, 2)))
    assert rows.min() > 112 and rows.max() > 125  # two lines, below the picture


def test_one_episode_of_each_task_as_films(tmp_path, opengl):
    pytest.importorskip("metaworld", reason="Meta-World needs the [sim] extra")
    options = {"policy": "expert", "size": 64, "progress": False, "workers": 1}
    records = demo(output=tmp_path, tasks="reach-v3,drawer-close-v3", **options)
    assert [(record.task, record.success) for record in records] == [("drawer-close-v3", True), ("reach-v3", True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.gif", "drawer-close-v3.mp4", "reach-v3.mp4"]
    with Image.open(tmp_path / "demo.gif") as gif:
        assert gif.n_frames == max(record.steps for record in records) + 1


def test_the_verb(tmp_path, opengl):
    pytest.importorskip("metaworld", reason="Meta-World needs the [sim] extra")
    arguments = ["demo", "--tasks", "reach-v3", "--max-steps", "2", "--workers", "1", "--output", str(tmp_path)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "reach-v3: failure, 2 steps (reach the goal)" in found.stdout and "0 of 1 succeeded" in found.stdout


def test_without_opengl_it_says_what_to_install(tmp_path, monkeypatch):
    def nothing():
        raise NoOpenGL("No OpenGL to render with. Install one of them, for example apt-get install libegl1")

    monkeypatch.setattr(demo_module, "opengl_backend", nothing)
    found = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert found.exit_code == 3  # `make demo` goes on
    assert re.search(r"^error: No OpenGL.*apt-get install", found.stderr) and not list(tmp_path.iterdir())


def test_episodes_that_all_broke_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "opengl_backend", lambda: "none")
    line = '{"task": "a", "episode": 0, "seed": 1, "instruction": "", "success": false, "steps": 0, "predictions": 0, '
    line += '"latency": 0.0, "error": "the arm fell off", "variation": ""}\n'
    monkeypatch.setattr(demo_module, "evaluate", lambda output, **options: (output / "episodes.jsonl").write_text(line))
    with pytest.raises(OSError, match="No episode could be run: the arm fell off"):
        demo(model="nothing", output=tmp_path)


def test_a_film_of_somebody_else_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "opengl_backend", lambda: "none")
    monkeypatch.setattr(demo_module, "evaluate", lambda **options: pytest.fail("evaluated"))
    (tmp_path / "demo.gif").write_bytes(b"GIF89a: holidays")
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "mine").touch()
    with pytest.raises(FileExistsError, match=r"demo.gif' was not made here.* move it away"):
        demo(model="nothing", output=tmp_path)
    save_tiles([film(4, True)], tmp_path / "demo.gif", size=40)  # as the demo before made it
    with pytest.raises(FileExistsError, match=r".unfinished' is in the way and was not made here"):
        demo(model="nothing", output=tmp_path)
    assert (tmp_path / ".unfinished" / "mine").exists()
    observation = Observation({"image": np.zeros((64, 64, 3), np.uint8)}, np.zeros(1), "go")
    video = EpisodeVideo(tmp_path / "go.mp4", observation)
    video.add(observation, np.zeros(7))
    video.save(success=True)
    check_replaceable(tmp_path / "go.mp4")


@pytest.mark.parametrize(
    ("named", "written"), [(("waist", "elbow"), ("waist", "elbow")), ((), ("action[0]", "action[1]"))]
)
def test_films_call_actions_as_the_environment_does(tmp_path, monkeypatch, named, written):
    pytest.importorskip("av", reason="videos need the [sim] extra")
    said = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, at, text, **how: said.append(text))
    observation = Observation({"image": np.zeros((64, 64, 3), np.uint8)}, np.zeros(1), "go")
    video = EpisodeVideo(tmp_path / "go.mp4", observation, named)
    video.add(observation, np.array([0.5, -1.0]))
    video.save(success=True)
    assert {*written} <= {*said} and (tmp_path / "go.mp4").is_file()


def test_films_of_robots_with_many_joints():
    """From 33 numbers on an evaluation ended with its first video."""
    values = [("joint", 1.0 if joint % 2 else -1.0) for joint in range(43)]
    picture = np.asarray(draw(np.zeros((64, 64, 3), np.uint8), "", values))
    width = picture.shape[1] / 43
    for joint, (_, value) in enumerate(values):
        bar = picture[:, round(joint * width) : round((joint + 1) * width)]
        shown = [(bar == color).all(axis=-1).any() for color in (GREEN, RED)]
        assert shown == [value > 0, value < 0]
    assert draw(np.zeros((1, 1000, 3), np.uint8), "", values).height > 1  # of a line camera


@pytest.mark.parametrize(("hz", "outcome"), [(5.0, 5), (12.5, 12), (0.2, 1), (None, 20)])
def test_films_are_as_fast_as_the_robot(tmp_path, hz, outcome):
    av = pytest.importorskip("av", reason="videos need the [sim] extra")
    observation = Observation({"image": np.zeros((64, 64, 3), np.uint8)}, np.zeros(1), "go")
    video = EpisodeVideo(tmp_path / "go.mp4", observation, hz=hz)
    for _ in range(3):
        video.add(observation, np.zeros(7))
    video.save(success=True)
    assert len(read_film(tmp_path / "go.mp4")) == 3
    with av.open(str(tmp_path / "go.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(hz or 20)
        assert sum(1 for _ in container.decode(video=0)) == 3 + outcome

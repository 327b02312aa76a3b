"""A look at a policy in the loop: one episode of each task, as videos and as one GIF."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..folders import locked, working_folder
from ..options.evaluation import DemoOptions
from .environment import environment_class, environment_options, file_name, renders
from .evaluate import evaluate
from .rendering import opengl_backend
from .report import EpisodeResult, NoEpisodes, read_results
from .video import Film, check_replaceable, read_film, save_tiles


GIF = "demo.gif"
UNFINISHED = ".unfinished"  # videos that are being made


def demo(options: DemoOptions | None = None, *, progress: bool = True, **given: Any) -> list[EpisodeResult]:
    """Run one episode of each task, without a screen, and write `TASK.mp4` and `demo.gif`, all tasks side by side.

    The episodes are the first of an evaluation: their seeds are not those of demonstrations. Nothing is kept but the
    videos, so that the next call runs them again.

    Args:
        options: What is shown; or its fields and options of the simulator as keywords, see `SimulatorOptions.of`.

    Returns:
        What became of each episode, by the name of its task.

    Raises:
        ValueError: If a task is unknown, or the simulator is not installed.
        NoOpenGL: If there is nothing to render with; says what to install.
        FileExistsError: If a file that would be replaced is not a video of this package.
        NoEpisodes: If no episode could be run to its end.
        BlockingIOError: If another process writes to the same folder.
    """
    options = options or DemoOptions.of(**given)
    environment_options(options.env, options.environment_options)  # says which there are
    if renders(environment_class(options.env)):
        opengl_backend()  # before the model is loaded
    folder = Path(options.output).expanduser()
    with locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_replaceable(folder / GIF)
        with working_folder(folder / UNFINISHED) as work:
            evaluate(**options.without("output"), output=work, episodes=1, videos=1, progress=progress)
            records = sorted(read_results(work / "episodes.jsonl"), key=lambda record: record.task)
            films = list(_films(records, work / "videos", folder))
        if not films:
            reasons = "; ".join(sorted({record.error.rstrip(".") for record in records if record.error}))
            nothing = f"'{options.env}' shows no images: there is nothing to make a video of."
            raise NoEpisodes(f"No episode could be run: {reasons}." if reasons else nothing)
        save_tiles(films, folder / GIF)
    return records


def _films(records: list[EpisodeResult], videos: Path, folder: Path) -> Iterator[Film]:
    """Move the video of each episode to `folder`; one that broke has none worth watching."""
    for record in records:
        made = videos / f"{file_name(record.task, f'{record.episode:03d}')}.mp4"
        if record.error is None and made.exists():
            film = folder / f"{file_name(record.task)}.mp4"
            check_replaceable(film)
            shutil.move(made, film)
            yield Film(read_film(film), record.instruction, record.success)

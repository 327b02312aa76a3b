"""The options of `openvla record`, with the texts that its --help shows."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..options import check_options, option, required


if TYPE_CHECKING:
    from .environment import Environment


# Episode k tries the seeds k, k + 10000, k + 20000, ...: each depends on its number alone, not on what failed before.
MOST_EPISODES = 10_000
NEUTRAL = ("output", "workers")  # options that change nothing in what is recorded


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded, and where to."""

    output: str = required(
        "Folder to write. Until the recording is complete, it is in OUTPUT.partial, not to be used otherwise."
    )
    env: str = option("metaworld", "Simulator: metaworld or robosuite.")
    tasks: str = option("mt10", "Tasks and sets of tasks, joined by commas: mt10, mt50, drawer-open-v3, ...")
    episodes: int = option(100, "Successful episodes of each task.")
    format: Literal["lerobot", "hdf5"] = option("lerobot", "LeRobot v3.0, or LIBERO-style HDF5, one file a task.")
    size: int = option(224, "Width and height of the images, in pixels.")
    camera: str | None = option(None, "Camera to record. Default: that of the simulator (metaworld: corner4).")
    wrist: bool = option(False, "Record the camera on the gripper as well.")
    images: Literal["jpeg", "png"] = option("jpeg", "How LeRobot images are stored; jpeg: quality 95.")
    paraphrases: bool = option(False, "Draw the instruction of each episode from the usual one and three paraphrases.")
    axis: str = option(
        "none",
        "Variations, joined by commas, each of which is recorded for the tasks that have it: none,language records the "
        "usual scenes, and those in which a task and its opposite are possible.",
    )
    noise: float = option(
        0.0,
        "Greatest standard deviation of noise on the executed translation, in units of the action; each episode draws "
        "its own below. The recorded action stays the expert's clean answer to what was seen: how to recover.",
    )
    student: str | None = option(
        None,
        "Model that acts first, for a number of steps that each episode draws, up to half of the longest; then the "
        "expert ends it. Recorded is the expert's answer throughout: what the model should have done (DAgger).",
    )
    seed: int = option(0, "Number of the first episode; other numbers begin elsewhere. Evaluation has its own seeds.")
    after_success: int = option(5, "Steps to record after the first success.")
    workers: int = option(1, "Processes, each with its own simulator.")

    def __post_init__(self) -> None:
        lowest = {"episodes": 1, "size": 1, "noise": 0, "seed": 0, "after_success": 0, "workers": 1}
        check_options(self, lowest)
        if self.seed + self.episodes > MOST_EPISODES:
            raise ValueError(
                f"seed={self.seed}, episodes={self.episodes}: episodes are numbered up to {MOST_EPISODES}."
            )

    def environment(self, **more: Any) -> "Environment":
        from .environment import make_environment  # not for the command line's --help

        camera = {"camera": self.camera} if self.camera else {}
        return make_environment(self.env, size=self.size, wrist=self.wrist, **camera, **more)

    @property
    def axes(self) -> tuple[str, ...]:
        """Variations as an environment takes them, "" for none; each once."""
        names = [name.strip() for name in self.axis.split(",") if name.strip()] or ["none"]
        return tuple(dict.fromkeys("" if name == "none" else name for name in names))

    def content(self) -> dict[str, Any]:
        """The options that decide what is recorded."""
        return {name: value for name, value in asdict(self).items() if name not in NEUTRAL}

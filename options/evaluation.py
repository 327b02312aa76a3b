"""Options of `openvla record`, `openvla evaluate` and `openvla demo`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from .fields import Options, default_of, option, pairs, required
from .prediction import ActingOptions


# Options that say how the model acts; references take its statistics alone, the expert nothing of it.
ACTING = ("dtype", "quantization", "decoding", "pixels", "execute", "chunking")
# Episode k tries the seeds k, k + 10000, k + 20000, ...: each depends on its number alone, not on what failed before.
MOST_EPISODES = 10_000


@dataclass(kw_only=True)
class SimulatorOptions(Options):
    """Which simulator, and which of its tasks."""

    env: str = option(
        "metaworld",
        "Simulator: metaworld, robosuite, libero_spatial, libero_object, libero_goal, libero_10 or libero_90; or "
        "MODULE:CLASS, a simulator of your own.",
        heading="Simulator",
    )
    env_options: dict[str, Any] = pairs(
        "Option of the simulator: NAME=VALUE, any number of times.", flag="--env-option"
    )
    tasks: str | None = option(
        None,
        "Tasks and sets of tasks, joined by commas: mt10, mt50, drawer-open-v3, ...",
        shown="the simulator's; metaworld: mt10, LIBERO: the suite",
    )
    camera: str | None = option(
        None,
        "Camera of the simulator: the one that the model's demonstrations had.",
        shown="the simulator's; metaworld: corner4",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {item.name: default_of(item) for item in fields(self)}
        for name, value in self.env_options.items():
            if name in known and (given := getattr(self, name)) != known[name]:
                raise ValueError(f"{name}={given!r}: the options of the simulator say {value!r}, give one of both.")

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From keywords: the fields by their names, every other is an option of the simulator."""
        known = {item.name for item in fields(cls)}
        more = {name: given.pop(name) for name in list(given) if name not in known}
        return cls(**{**given, "env_options": {**given.get("env_options", {}), **more}})

    @property
    def environment_options(self) -> dict[str, Any]:
        """As `make_environment` takes them."""
        return {**self.env_options, **({"camera": self.camera} if self.camera else {})}


@dataclass(kw_only=True)
class RecordOptions(SimulatorOptions):
    """What is recorded, and where to."""

    output: str = required(
        "Folder to write. Until the recording is complete, it is in OUTPUT.partial, not to be used otherwise.",
        neutral=True,
    )
    env: str = option(
        "metaworld", "Simulator: metaworld or robosuite; or MODULE:CLASS, a simulator of your own.", heading="Simulator"
    )
    tasks: str = option("mt10", "Tasks and sets of tasks, joined by commas: mt10, mt50, drawer-open-v3, ...")
    camera: str | None = option(None, "Camera to record. Default: that of the simulator (metaworld: corner4).")
    episodes: int = option(100, "Successful episodes of each task.", least=1, heading="Recording")
    format: Literal["lerobot", "hdf5"] = option("lerobot", "LeRobot v3.0, or LIBERO-style HDF5, one file a task.")
    size: int = option(224, "Width and height of the images, in pixels.", least=1, below=4097)
    wrist: bool = option(False, "Record the camera on the gripper as well.")
    images: Literal["jpeg", "png"] = option("jpeg", "How LeRobot images are stored; jpeg: quality 95.")
    paraphrases: bool = option(False, "Draw the instruction of each episode from the usual one and three paraphrases.")
    axis: str = option(
        "none",
        "Variations, joined by commas, each of which is recorded for the tasks that have it: none,language records the "
        "usual scenes, and those in which a task and its opposite are possible.",
        heading="Variation",
    )
    noise: float = option(
        0.0,
        "Greatest standard deviation of noise on the executed translation, in units of the action; each episode draws "
        "its own below. The recorded action stays the expert's clean answer to what was seen: how to recover.",
        least=0,
    )
    delay: int = option(
        0,
        "Steps by which answers of the expert are late at most: in spells of up to so many steps the robot does what "
        "the expert answered before, as where a model thinks while the world goes on. The recorded action stays the "
        "answer to what was seen. For chunks that are to be used in real time.",
        least=0,
    )
    student: str | None = option(
        None,
        "Model that acts first, for a number of steps that each episode draws, up to half of the longest; then the "
        "expert ends it. Recorded is the expert's answer throughout: what the model should have done (DAgger).",
        heading="Student",
    )
    unnorm_key: str | None = option(
        None,
        "Dataset of the student in whose units it acts.",
        shown="that of the simulator, or the student's, if it has only one",
    )
    latency: float = option(
        0.0,
        "Seconds that an answer of the student takes at most, while the world goes on and the student continues what "
        "is executed (evaluate --control realtime --chunking prefix); each episode draws its own below.",
        least=0,
    )
    device: str = option("cpu", "Where the student runs: auto, cpu, cuda or mps.", neutral=True)
    seed: int = option(
        0,
        "Number of the first episode; other numbers begin elsewhere. Evaluation has its own seeds.",
        least=0,
        heading="Recording",
    )
    after_success: int = option(5, "Steps to record after the first success.", least=0)
    workers: int = option(1, "Processes, each with its own simulator.", least=1, below=1025, neutral=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latency and self.student is None:
            raise ValueError(f"latency={self.latency:g}: of a student, give one; answers of the expert have --delay.")
        if self.unnorm_key is not None and self.student is None:
            raise ValueError(f"unnorm_key={self.unnorm_key!r}: of a student, give one.")
        if self.seed + self.episodes > MOST_EPISODES:
            raise ValueError(
                f"seed={self.seed}, episodes={self.episodes}: episodes are numbered up to {MOST_EPISODES}."
            )

    @property
    def environment_options(self) -> dict[str, Any]:
        return {"size": self.size, "wrist": self.wrist, **super().environment_options}

    @property
    def axes(self) -> tuple[str, ...]:
        """Variations as an environment takes them, "" for none; each once."""
        return tuple("" if name == "none" else name for name in names_of(self.axis))


@dataclass(kw_only=True)
class ClosedLoopOptions(SimulatorOptions, ActingOptions):
    """Who acts in the simulator, and how many environments run side by side."""

    policy: Literal["model", "expert", "random", "mean"] = option(
        "model",
        "What acts: the model; to compare, the scripted expert, random actions or the mean action.",
        heading="Episodes",
    )
    max_steps: int | None = option(
        None, "Steps after which an episode has failed.", least=1, shown="the simulator's; metaworld: 125"
    )
    workers: int | None = option(
        None,
        "Environments that run side by side.",
        least=1,
        below=1025,
        neutral=True,
        shown="one for each core, at most 8",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {item.name: default_of(item) for item in fields(self)}
        expert = ("model", "unnorm_key", "action_head", "action_chunk", *ACTING)
        unused: tuple[str, ...] = {"expert": expert, "model": ()}.get(self.policy, ACTING)
        for name in unused:
            if name in known and (value := getattr(self, name)) != known[name]:
                raise ValueError(f"{name}={value!r}: policy={self.policy!r} has no use for it, leave it out.")


@dataclass(kw_only=True)
class EvaluateOptions(ClosedLoopOptions):
    """An evaluation: which episodes, who is in control, where the report goes."""

    output: Path = required("Folder for episodes, report and videos.", neutral=True)
    episodes: int = option(50, "Episodes of each task.", least=1, below=1_000_000, neutral=True, heading="Episodes")
    control: Literal["blocking", "realtime"] = option(
        "blocking",
        "What the world does while the model thinks: blocking, it waits; realtime, it continues.",
        heading="Control",
    )
    hz: float | None = option(
        None, "Steps of the world in a second (realtime).", above=0, shown="the simulator's; metaworld: 20"
    )
    latency: float | None = option(
        None, "Seconds that a prediction takes (realtime).", least=0, neutral=True, shown="measured"
    )
    late: Literal["repeat", "still"] | None = option(
        None,
        "What a step without an action of its own does (realtime): repeat the last one, or stand still, the gripper as "
        "it is.",
        shown="repeat",
    )
    chunking: Literal["switch", "hold", "ensemble", "prefix"] | None = option(
        None,
        "What becomes of chunks (realtime). switch: the newest answer counts alone. prefix: the model is given the "
        "actions that are executed while it thinks, and continues them. ensemble: the weighted mean of all answers, "
        "number by number: not for absolute angles that pass half a turn. hold: of each chunk the first action, "
        "repeated.",
        shown="switch",
    )
    execute: int | None = option(
        None, "Actions of a chunk that are executed before the model looks again. Default: all.", least=1
    )
    axis: str = option(
        "none",
        "What differs from the recorded episodes, joined by commas: visual, motion, physical, semantic, language (each "
        "episode draws one kind), one kind such as visual:light, all for the five of them, none for nothing. Each is "
        "run for the tasks that have it, and has a row in the report.",
        heading="Episodes",
    )
    pixels: Literal["published", "libero", "oft"] | None = option(
        None,
        "Show the model other pixels than those stored with it: published, those of the published image processor; "
        "libero, resized with lanczos3 and cropped to the middle nine tenths of the area; oft, the same after a JPEG "
        "round trip, as OpenVLA-OFT evaluates.",
        shown="as stored with the model",
        heading="Model",
    )
    videos: int = option(1, "Episodes of each task to record as videos.", least=0, neutral=True, heading="Episodes")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"hz": self.hz, "latency": self.latency, "late": self.late, "chunking": self.chunking}
        if self.control == "blocking" and any(value is not None for value in given.values()):
            shown = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            raise ValueError(f"{shown}: only for control='realtime'; blocking waits.")
        if self.chunking == "hold" and (self.execute or 1) > 1:
            raise ValueError(
                f"execute={self.execute}: chunking='hold' executes the first action of each chunk alone, leave one out."
            )


@dataclass(kw_only=True)
class DemoOptions(ClosedLoopOptions):
    """One episode of each task, to be watched."""

    output: Path = option(Path("outputs/demo"), "Folder for the videos.", neutral=True, heading="Episodes")


def names_of(text: str) -> tuple[str, ...]:
    """Names that are joined by commas, each once; "none" where there is none."""
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    return tuple(names) or ("none",)

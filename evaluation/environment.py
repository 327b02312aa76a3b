"""What a policy acts in: one protocol for all simulators, and the names they go by."""

import hashlib
import importlib
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..action_spec import ActionSpec, usual_spec
from ..choices_openvla import check_choice
from ..observation import Observation
from ..plugins import is_reference, load_class, options_known, read_options
from ..policy import check_numbers, check_reach
from .attributes import check_attributes, variations_of


SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# Name -> (module of this package, its class, what to install for it, options that the name stands for)
ENVIRONMENTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "metaworld": ("metaworld", "MetaWorld", "openvla[sim]", {}),
    "robosuite": ("robosuite", "Robosuite", "openvla[robosuite]", {}),
    **{suite: ("libero", "Libero", "hf-libero", {"suite": suite}) for suite in SUITES},
}
AXES = ("visual", "motion", "physical", "semantic", "language")  # of generalization, in the paper's order
# A seed decides where everything in an episode begins. Demonstrations and evaluation share none.
RECORDING_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 2_000_000)
LONGEST_NAME = 240  # bytes of a file's name: file systems take 255, and endings follow
POLICY_SEED = 7  # of what a model draws (diffusion begins with noise), as in the evaluation of OpenVLA-OFT


class Environment(Protocol):
    """A simulated robot with tasks of its own.

    Actions are (A,). An attribute `action_spec` (`ActionSpec`) says what they mean; without one they are x, y, z
    translation, roll, pitch, yaw rotation and gripper (1 open, 0 closed), and an attribute `unit` may say in words what
    1 is: recordings and the models that learn from them keep it. An environment whose actions are places has a method
    `standstill()` -> (A,), where the robot stands: it is asked when an episode has begun, and what it says is executed
    until a policy has answered. An attribute `unnorm_keys` names the datasets that were recorded in it: of a model of
    several datasets, the first that it knows gives the units.
    """

    tasks: tuple[str, ...]
    task_sets: Mapping[str, tuple[str, ...]]  # names for several tasks, such as "mt10"
    max_steps: int  # after which an episode has failed
    frequency: float  # actions in a second of the world
    robot: str
    state_names: tuple[str, ...]  # of the numbers of a state

    def instructions(self, task: str, *, held_out: bool = False) -> tuple[str, ...]:
        """Ways to ask for a task, the usual one first; `held_out`: wordings that recording never uses."""
        ...

    def variations(self, task: str) -> tuple[str, ...]:
        """What episodes of a task can differ in, "axis:kind" each, of `AXES`; none in most environments."""
        ...

    def reset(self, seed: int, task: str, variation: str = "") -> Observation:
        """Begin an episode. The same arguments give the same episode, whatever came before.

        Args:
            variation: One of those of the task, an axis alone for one of its kinds drawn by the seed, or "" for none.

        Raises:
            ValueError: If the task or the variation is unknown, or the task does not have that variation.
        """
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute an action, (A,): what is seen then, and whether the task is done in this moment.

        Raises:
            ValueError: If `check_action` refuses the action, or no episode has begun.
        """
        ...

    def expert_action(self) -> np.ndarray:
        """(A,) what the scripted expert, who knows the state of the world, does next.

        Raises:
            ValueError: If the environment has no expert.
        """
        ...

    def close(self) -> None:
        """Free the simulator and its graphics."""
        ...


METHODS = ("instructions", "variations", "reset", "step", "expert_action", "close")  # of an `Environment`


def make_environment(name: str, **options: Any) -> Environment:
    """The environment of that name, or a class of your own as MODULE:CLASS; `options` are those of its constructor.

    Raises:
        ValueError: If there is no such environment, it lacks one of the options, its simulator is not installed, or a
            class of your own is no `Environment`, see `check_attributes`.
    """
    make, implied, package = _environment(name)
    given = environment_options(name, options)
    needed = [option for option, item in options_known(make).items() if item.default is item.empty]
    if missing := [option for option in needed if option not in {**implied, **given}]:
        raise ValueError(f"simulator {name!r} needs {', '.join(missing)}: --env-option {missing[0]}=...")
    try:
        environment = make(**implied, **given)
    except ModuleNotFoundError as error:
        _explain(name, package, error)
        raise
    check_attributes(environment, name)
    return environment


def environment_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as the constructor of an environment takes them: texts of the command line are read, and what is
    switched off (render=False) is left out where it cannot be switched.

    Raises:
        ValueError: If it has no such option, or a text is not what the option needs.
    """
    make, implied, _ = _environment(name)
    known = options_known(make)
    given = {option: value for option, value in options.items() if option in known or value is not False}
    return read_options(make, given, name, without=implied)


def renders(environment: Any) -> bool:
    """Whether an environment, or a class of one, renders with OpenGL: it has an option `render`, on by default."""
    return "render" in options_known(environment if isinstance(environment, type) else type(environment))


def environment_class(name: str) -> type:
    """The class behind a name, or MODULE:CLASS. Raises a `ValueError` as `make_environment`."""
    return _environment(name)[0]


def _environment(name: str) -> tuple[Any, dict[str, Any], str]:
    """Class of an environment, options that its name stands for, and what to install for it."""
    if is_reference(name):
        return load_class(name, "simulator", METHODS), {}, ""
    check_choice("environment", name, ENVIRONMENTS, "Or MODULE:CLASS, a simulator of your own.")
    module, cls, package, implied = ENVIRONMENTS[name]
    try:
        return getattr(importlib.import_module(f".{module}", __package__), cls), implied, package
    except ModuleNotFoundError as error:
        _explain(name, package, error)
        raise


def _explain(name: str, package: str, error: ModuleNotFoundError) -> None:
    """Raise a `ValueError` that says what to install, where it is not a fault of this package or of a user's class."""
    if package and (error.name or "").partition(".")[0] != __package__.partition(".")[0]:
        raise ValueError(
            f"The environment '{name}' needs {error.name}, which is not installed: pip install '{package}'."
        ) from error


def usual_tasks(environment: Environment) -> str:
    """What is evaluated where no tasks are named: the first of its sets of tasks, or all tasks where it has no set."""
    return next(iter(environment.task_sets), ",".join(environment.tasks))


def choose_tasks(environment: Environment, tasks: str) -> tuple[str, ...]:
    """Names of tasks and of sets of them, joined by commas, as the tasks they stand for; each once. A name may hold
    commas.

    Raises:
        ValueError: If a name is unknown; the nearest one is given. Or if it is that of a task and of several as well.
    """
    known, parts = [*environment.task_sets, *environment.tasks], [part for part in tasks.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"tasks={tasks!r} names no task. Sets of tasks: {', '.join(environment.task_sets)}.")
    readings = _readings(parts, {*known})
    if not readings:
        check_choice("tasks", next((part.strip() for part in parts if part.strip() not in known), tasks), known)
    if len(readings) > 1:
        raise ValueError(
            f"tasks={tasks!r}: a name holds a comma, so that this is {' or '.join(map(str, readings))}: give them in "
            "another order or one by one, or rename a task."
        )
    return tuple(dict.fromkeys(task for name in readings[0] for task in environment.task_sets.get(name, (name,))))


def _readings(parts: Sequence[str], known: Set[str]) -> list[list[str]]:
    """Up to two of the lists of names that a text may be, of which these are the parts between its commas: a name may
    hold some."""
    most = 1 + max((name.count(",") for name in known), default=0)
    found: dict[int, list[list[str]]] = {len(parts): [[]]}  # of what begins with a part
    for start in reversed(range(len(parts))):
        ends = range(start + 1, min(start + most, len(parts)) + 1)
        names = [(",".join(parts[start:end]).strip(), end) for end in ends]
        found[start] = [[name, *others] for name, end in names if name in known for others in found[end]][:2]
    return found[0]


def choose_variations(environment: Environment, tasks: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """What names of variations stand for, each once: "all" for every axis that one of `tasks` has, "none" for "".

    Raises:
        ValueError: If "all" is asked for and the tasks have none.
    """
    available = {kind.partition(":")[0] for task in tasks for kind in variations_of(environment, task)}
    axes = dict.fromkeys(axis for axis in AXES if axis in available)
    chosen: dict[str, None] = {}
    for name in names:
        if name == "all" and not axes:
            raise ValueError(f"axis='all': {', '.join(tasks)} have no variations.")
        chosen |= axes if name == "all" else {"" if name == "none" else name: None}
    return tuple(chosen)


def tasks_with(environment: Environment, tasks: Sequence[str], variation: str) -> tuple[str, ...]:
    """Those of `tasks` that have a variation, or a kind of it where it is an axis alone; all have "".

    Raises:
        ValueError: If none has it; the nearest that one of them has is given.
    """
    kinds = {task: variations_of(environment, task) if variation else () for task in tasks}
    having = {task: {"", *of_task, *(kind.partition(":")[0] for kind in of_task)} for task, of_task in kinds.items()}
    if variation:
        known = sorted(set().union(*having.values()) - {""})
        if not known:
            raise ValueError(f"axis={variation!r}: {', '.join(tasks)} have no variations.")
        check_choice("axis", variation, ["none", "all", *known])
    return tuple(task for task in tasks if variation in having[task])


def file_name(*parts: str) -> str:
    """What a file is called after a task and its variation; those of a simulator may hold any character, and be as long
    as an instruction: a name that is cut ends in a digest of all of it."""
    name = re.sub(r"[:/\\\0]", "-", "_".join(filter(None, parts)))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    ending = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name.encode()[: LONGEST_NAME - len(ending)].decode(errors="ignore") + ending


def asks_for_wrist(env: str, sees: Sequence[str]) -> bool:
    """Whether a model with these cameras needs that on the gripper, which the environment shows where it is told to."""
    return any("wrist" in name for name in sees) and "wrist" in options_known(environment_class(env))


def action_spec_of(environment: Environment) -> ActionSpec:
    """What the numbers of its actions mean."""
    unit = getattr(environment, "unit", None)
    unit = unit if isinstance(unit, str) else None  # of a simulator that knows nothing of this it may be a number
    spec = getattr(environment, "action_spec", None) or usual_spec(7, hz=environment.frequency)
    return replace(spec, unit=spec.unit or unit)


def with_cameras(of_environment: Mapping[str, Any], env: str, sees: Sequence[str]) -> Mapping[str, Any]:
    """Options of the environment, with the camera on the gripper where the model sees it and nothing was said."""
    return {"wrist": True, **of_environment} if asks_for_wrist(env, sees) else of_environment


def dataset_of(environment: Environment, statistics: Mapping[str, Any]) -> str | None:
    """Which of the datasets of a model was recorded in the environment; None where nothing says so."""
    return next((name for name in getattr(environment, "unnorm_keys", ()) if name in statistics), None)


def warn_of_other_units(
    environment: Environment, statistics: Mapping[str, Any], unnorm_key: str | None, model: str, env: str
) -> None:
    """Warn of a model that knows one dataset alone, where nobody chose it and it is none of those that were recorded in
    the environment: its actions have the units of another robot or of other tasks."""
    recorded = getattr(environment, "unnorm_keys", ())
    if unnorm_key is None and recorded and len(statistics) == 1 and dataset_of(environment, statistics) is None:
        (only,) = statistics
        warnings.warn(
            f"'{model}' acts in the units of '{only}', the only dataset it knows, and demonstrations of '{env}' are "
            f"called {' or '.join(recorded)}. If its units are those, say so (--unnorm-key {only}); else take a model "
            "that was trained on these.",
            stacklevel=4,
        )


def has_other_rate(recorded: float | None, environment: Environment, model: str, env: str, more: str = "") -> bool:
    """Whether the actions of a model were recorded at another rate (`recorded`, a second) than the environment takes,
    which is a warning, with `more` behind it."""
    if not recorded or abs(recorded / environment.frequency - 1) <= 0.01:
        return False
    warnings.warn(
        f"The actions of '{model}' were recorded at {recorded:g} a second, and '{env}' takes "
        f"{environment.frequency:g}: each lasts another time here. Give the simulator the rate of the recording "
        f"(metaworld: --env-option frequency={recorded:g}){more}.",
        stacklevel=4,
    )
    return True


def check_dimensions(stats: Mapping[str, Any], model: str, env: str, spec: ActionSpec) -> None:
    """Raise a `ValueError` if the actions of a model are not those of the environment, before its weights are read."""
    dims = len(stats["q01"])
    if dims != spec.action_dim:
        raise ValueError(
            f"The actions of '{model}' have {dims} dimensions, those of '{env}' {spec.action_dim}: another unnorm_key, "
            "or a model that was trained for this environment?"
        )


def check_state(proprio_dim: int | None, model: str, env: str, names: Sequence[str]) -> None:
    """The same of the state that a model sees; None: it sees none."""
    if proprio_dim is not None and proprio_dim != len(names):
        raise ValueError(
            f"'{model}' sees a state of {proprio_dim} numbers, and '{env}' gives {len(names)} ({', '.join(names)}): a "
            "model that was trained on states of this environment?"
        )


def standstill(environment: Environment) -> np.ndarray:
    """(A,) what is executed until a policy has answered, in an episode that has begun. Raises a `ValueError` where
    nothing says what stands still, or what says so gives no action."""
    spec = action_spec_of(environment)
    if not hasattr(environment, "standstill"):
        return np.array(spec.standstill())
    try:
        return check_action(environment.standstill(), spec.action_dim)
    except ValueError as error:
        raise ValueError(f"standstill() of {type(environment).__name__}: {error}") from error


def check_observation(found: Any, method: str = "reset") -> Observation:
    """What `reset` of an environment gave, or the observation of a `step`.

    Raises:
        ValueError: If it is no `Observation`, an image is not (H, W, 3) uint8, or the state holds no finite numbers.
    """
    if not isinstance(found, Observation):
        raise ValueError(f"{method}() gave a {type(found).__name__}, expected an Observation, see docs/extending.md.")
    if not isinstance(found.images, Mapping):
        kind = type(found.images).__name__
        raise ValueError(f"{method}(): images is a {kind}, expected {{camera: (H, W, 3) uint8}}.")
    for camera, image in found.images.items():
        kind, shape = getattr(image, "dtype", type(image).__name__), np.shape(image)
        if kind != np.uint8 or len(shape) != 3 or shape[-1] != 3 or not all(shape):
            raise ValueError(f"{method}(): the image of '{camera}' is {shape} of {kind}, expected (H, W, 3) uint8.")
    if not isinstance(found.instruction, str):
        raise ValueError(f"{method}(): instruction={found.instruction!r}, expected a text.")
    state = np.asarray(found.state)
    if state.ndim != 1 or state.dtype.kind not in "fiub" or not np.isfinite(state).all():
        raise ValueError(f"{method}(): state={found.state!r:.200}, expected finite numbers (S,).")
    return found


def check_form(found: Observation, first: Observation, method: str = "step") -> None:
    """Raise a `ValueError` where what is seen has other cameras, or a state of another length, than what was seen
    first: a policy would go on with whatever is there."""
    if found.images.keys() != first.images.keys():
        raise ValueError(
            f"{method}() shows the cameras {', '.join(found.images) or 'none'}, and before "
            f"{', '.join(first.images) or 'none'}: expected the same in all of a task."
        )
    if np.shape(found.state) != np.shape(first.state):
        raise ValueError(f"{method}() gave a state of {len(found.state)} numbers, and before of {len(first.state)}.")


def check_expert(environment: Environment, answer: Any) -> np.ndarray:
    """(A,) float64 of what the expert answered; a `ValueError` where it is no action of the environment."""
    spec = getattr(environment, "action_spec", None)
    try:
        return check_action(answer, 7 if spec is None else spec.action_dim)
    except ValueError as error:
        raise ValueError(
            f"The expert of {type(environment).__name__}: {error} Actions of other numbers need an action_spec."
        ) from error


def check_step(found: Any) -> tuple[Observation, bool]:
    """What `step` of an environment gave. Raises a `ValueError` if it is no observation with true or false."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        count = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
        raise ValueError(f"step() gave a {type(found).__name__}{count}, expected (Observation, success).")
    observation, success = found
    if np.ndim(success) or success not in (True, False):
        raise ValueError(f"step(): success={success!r:.200}, expected true or false.")
    return check_observation(observation, "step"), bool(success)


def check_action(action: Sequence[float] | np.ndarray, action_dim: int = 7) -> np.ndarray:
    """`action` as `action_dim` finite float64 numbers, none beyond `FARTHEST`.

    Raises:
        ValueError: If it is anything else.
    """
    expected = f"{action_dim} finite numbers"
    checked = check_reach(check_numbers(action, expected))
    if checked.shape != (action_dim,):
        raise ValueError(f"action={checked.tolist()}: expected {expected}.")
    return checked

"""Records single episodes, in processes that import neither torch nor transformers (see `workers`)."""

from pathlib import Path
from typing import Any

from ..data.episode import Episode
from ..device import torch_device
from ..hub import model_folder, statistics_of
from ..options.evaluation import MOST_EPISODES, RecordOptions
from ..options.fields import decisive
from ..plugins import options_known
from ..policy import OpenVLAPolicy, Policy
from .environment import RECORDING_SEEDS, Environment, dataset_of, environment_class, make_environment
from .expert_episode import record_episode, save_episode


ATTEMPTS = 20  # of the expert at an episode


def open_environment(options: RecordOptions, **more: Any) -> Environment:
    """The environment of a recording; `more` options of its constructor win."""
    given = options.environment_options
    if given["size"] == decisive(RecordOptions)["size"] and "size" not in options_known(environment_class(options.env)):
        del given["size"]  # nobody asked for it, and the simulator has one of its own
    return make_environment(options.env, **{**given, **more})


def student_units(options: RecordOptions, environment: Environment) -> tuple[dict[str, Any], str | None]:
    """Statistics of the student, and the dataset in whose units it acts; None: the only one that it knows."""
    known = statistics_of(model_folder(str(options.student)))
    several = options.unnorm_key is None and len(known) > 1
    return known, dataset_of(environment, known) if several else options.unnorm_key


def check_names(episode: Episode, environment: Environment, env: str) -> None:
    """Raise a `ValueError` where a data set has no name for each number of a state, or the other way round; else it is
    said when all episodes are recorded."""
    numbers, names = 0 if episode.state is None else episode.state.shape[1], environment.state_names
    if numbers and numbers != len(names):
        raise ValueError(
            f"'{env}' gives states of {numbers} numbers and {len(names)} state_names ({', '.join(names)}): LeRobot "
            "needs a name for each."
        )


class Recorder:
    """Records single episodes to files."""

    def __init__(self, options: RecordOptions):
        self.options, self.environment = options, open_environment(options)
        self.student: Policy | None = None
        self.blind: Environment | None = None
        if options.student is not None:
            _, key = student_units(options, self.environment)
            self.student = OpenVLAPolicy.load(options.student, unnorm_key=key, device=torch_device(options.device))
        elif options.noise or options.delay:
            # The expert fails more often then; pictures take nearly all of the time, so a first try goes without.
            self.blind = open_environment(options, render=False)

    def record(self, task: str, axis: str, number: int, file: Path) -> None:
        """Try seeds until the expert succeeds; the file appears when it is complete."""
        for attempt in range(ATTEMPTS):
            seed = RECORDING_SEEDS[attempt * MOST_EPISODES + number]
            if self.blind is not None and self._try(self.blind, task, axis, seed) is None:
                continue
            episode = self._try(self.environment, task, axis, seed)
            if episode is not None and not episode.images:
                raise ValueError(
                    f"'{self.options.env}' shows no images, and nobody learns from a recording without: let it render "
                    "(without --env-option render=false)."
                )
            if episode is not None and self.options.format == "lerobot":
                check_names(episode, self.environment, self.options.env)
            if episode is not None:
                save_episode(episode, file, seed=seed, failed=attempt)
                return
        raise ValueError(f"The expert failed {ATTEMPTS} times at '{task}', episode {number}: less noise may help.")

    def _try(self, environment: Environment, task: str, axis: str, seed: int) -> Episode | None:
        options = self.options
        if self.student is not None:
            import torch  # of a student alone

            torch.manual_seed(seed)  # what a head draws is of the episode too, whatever was recorded before
        return record_episode(
            environment,
            task,
            seed,
            variation=axis,
            noise=options.noise,
            delay=options.delay,
            student=self.student,
            latency=options.latency,
            paraphrases=options.paraphrases,
            after_success=options.after_success,
            image_format="png" if options.format == "hdf5" else options.images,
        )

    def close(self) -> None:
        for environment in filter(None, (self.environment, self.blind)):
            environment.close()

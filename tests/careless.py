"""Simulators of one's own that are not quite what is expected, as --env careless:Blind."""

from dataclasses import replace

from toy import Line


class Gymnasium(Line):
    """Steps as its environments do."""

    max_steps, frequency = 40, 20.0

    def step(self, action):
        observation, success = super().step(action)
        return observation, 0.0, success, False, {}


class Blind(Line):
    """Shows nothing; its tasks have names that no file has."""

    tasks, task_sets, max_steps, frequency, robot, state_names = ("open/it",), {}, 40, 20.0, "toy", ("x",)

    def __init__(self, *, size=16):
        pass

    def instructions(self, task, *, held_out=False):
        return ("move to the goal",)

    def variations(self, task):
        return ()

    def _observe(self):
        return replace(super()._observe(), images={})


class Seeing(Blind):
    _observe = Line._observe


class Twins(Seeing):
    tasks = ("open/it", "open-it")


class Sizes(Seeing):
    """Shows one of its tasks in smaller pictures."""

    tasks = ("near", "far")

    def _observe(self):
        observation = super()._observe()
        less = 2 if self.task == "far" else 1
        pictures = {camera: image[::less, ::less] for camera, image in observation.images.items()}
        return replace(observation, images=pictures)


class Slashes(Seeing):
    tasks = ("up", "down", "other")

    def instructions(self, task, *, held_out=False):
        return ({"up": "up/down", "down": "up:down", "other": "up-down_up"}[task],)


class Needs(Blind):
    def __init__(self, path, *, size=16):
        raise AssertionError("made without a path")


class Breaks:
    """As a `Recorder` whose expert never succeeds."""

    def record(self, *job):
        raise ValueError("The expert failed 20 times.")


class Wordy(Seeing):
    """Tasks that are called as their instructions, which no name of a file is as long as."""

    tasks = ("把杯子放到架子上" * 12 + "一", "把杯子放到架子上" * 12 + "二")

    def instructions(self, task, *, held_out=False):
        return (task,)

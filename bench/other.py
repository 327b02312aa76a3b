"""Predictions of something else than this process: an ONNX export, or another environment."""

import base64
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..options.benchmark import BenchOptions
from .subject import Frame


WORKER = Path(__file__).with_name("worker.py")
ANSWER_S = 1800.0  # an answer takes this long at most: 7B are loaded from a slow disk meanwhile


class Other:
    """Another interpreter that loads the same folder and predicts the same frames, one after the other.

    What it has installed decides what is measured: openvla of any version; or, where there is none, the original's
    code, of the folder itself or of `--original-code`.

    Attributes:
        milliseconds: Of the last prediction by its own clock: without the pipe that images come through.

    Raises:
        ValueError: If it cannot be started, or does not answer; its own words are in the error stream.
    """

    def __init__(self, python: str, options: BenchOptions, key: str):
        if options.preset is not None:
            raise ValueError("--against compares predictions of a folder: give --model, and no --preset.")
        code = options.original_code
        if code is not None and not (code / "modeling_prismatic.py").is_file():
            raise ValueError(
                f"--original-code: no modeling_prismatic.py in '{code}'; give prismatic/extern/hf of a clone of the "
                "original's repository."
            )
        settings: dict[str, Any] = {
            "model": options.model,
            "unnorm_key": key,
            "device": options.device,
            "dtype": options.dtype,
            "threads": options.threads,
            "code": options.original_code and str(options.original_code.resolve()),
        }
        try:
            self.process = subprocess.Popen(
                [python, str(WORKER), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(f"--against: '{python}' cannot be started ({error}): give an interpreter.") from error
        self.python, self.milliseconds = python, 0.0
        self._exchange()

    def prepare(self, frame: Frame) -> None:
        """Nothing is kept between frames."""

    def __call__(self, frame: Frame) -> np.ndarray:
        image = next(iter(frame.images.values()))
        content = {"shape": image.shape, "image": base64.b64encode(image.tobytes()).decode()}
        answer = self._exchange({**content, "instruction": frame.instruction})
        self.milliseconds = answer["ms"]
        return np.array(answer["actions"])

    def _exchange(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """The next answer, to a request if there is one. One that hangs, and may not even read, is ended."""
        assert self.process.stdin is not None and self.process.stdout is not None  # pipes, as asked for
        started, late = time.monotonic(), threading.Timer(ANSWER_S, self.process.kill)
        late.start()
        try:
            if request is not None:
                with suppress(BrokenPipeError):  # it has ended: said below, and not taken for the end of our own reader
                    self.process.stdin.write(json.dumps(request) + "\n")
                    self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            said = f"ended with {self.process.wait()} and no answer, see above"
            if time.monotonic() - started >= ANSWER_S:
                said = f"has not answered in {ANSWER_S:g} s, and was ended"
            raise ValueError(f"--against: '{self.python}' {said}.")
        try:
            return json.loads(line)
        except ValueError as error:
            said = f"answers {line!r:.80}, which is nothing that was asked: give an interpreter"
            raise ValueError(f"--against: '{self.python}' {said}.") from error

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Onnx:
    """An export in openvla-runtime, with the drafts that it takes by itself."""

    def __init__(self, policy: Any):
        self.policy = policy

    def prepare(self, frame: Frame) -> None:
        if frame.begins:
            self.policy.reset()

    def close(self) -> None:
        """Nothing is open."""

    def __call__(self, frame: Frame) -> np.ndarray:
        return self.policy.act(frame.images, frame.instruction, state=frame.state)


def open_onnx(options: BenchOptions, key: str) -> Onnx:
    """Raises a `ModuleNotFoundError` without openvla-runtime, a `ValueError` where the export is of another model."""
    packages = Path(__file__).resolve().parents[1] / "packages" / "openvla-runtime"
    if packages.is_dir():  # a checkout
        sys.path.append(str(packages))
    try:
        from openvla_runtime import OnnxPolicy
    except ImportError as error:
        raise ModuleNotFoundError(
            "--onnx needs openvla-runtime, which is not installed: pip install packages/openvla-runtime of the "
            "repository.",
            name="openvla_runtime",
        ) from error
    try:
        return Onnx(OnnxPolicy(str(options.onnx), key, threads=options.threads))
    except KeyError as error:
        raise ValueError(f"onnx='{options.onnx}' is an export of another model: it does not know '{key}'.") from error

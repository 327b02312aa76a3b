"""`openvla_runtime` as its wheel gives it, in an environment without torch: the tokens of the embedded policy.

Run by `make test-runtime`, once to write what the model answers, once where it is compared; no part of the test-suite.

    python tests/check_runtime.py --write FOLDER     # with openvla
    python tests/check_runtime.py FOLDER             # without torch
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import sys
import sysconfig
from pathlib import Path


FRAMES = Path(__file__).resolve().parents[1] / "examples/frames"
EXPECTED = "expected.json"


def frames() -> list[dict]:
    return json.loads((FRAMES / "frames.json").read_text())


def write(folder: Path) -> None:
    from openvla import OpenVLAForActionPrediction

    model = OpenVLAForActionPrediction.from_pretrained(FRAMES.parents[1]).eval()
    found = [
        model.predict_action(str(FRAMES / frame["file"]), frame["instruction"], return_dict=True) for frame in frames()
    ]
    answers = [{"tokens": one.token_ids.tolist(), "actions": one.actions.tolist()} for one in found]
    (folder / EXPECTED).write_text(json.dumps(answers))


def compare(folder: Path) -> None:
    there = [name for name in ("torch", "transformers", "openvla") if importlib.util.find_spec(name)]
    assert not there, f"{there} are installed: this environment is to be without them"

    import openvla_runtime

    installed = Path(openvla_runtime.__file__).parent
    assert installed == Path(sysconfig.get_path("purelib")) / "openvla_runtime", f"{installed} is no installation"
    policy = openvla_runtime.OnnxPolicy(folder, threads=1)
    answers = json.loads((folder / EXPECTED).read_text())
    for frame, answer in zip(frames(), answers, strict=True):
        for _ in range(2):  # the second time with a right draft
            prediction = policy.predict(FRAMES / frame["file"], frame["instruction"])
            assert prediction.token_ids.tolist() == answer["tokens"], (frame, prediction)
            assert prediction.actions.tolist() == answer["actions"], (frame, prediction)
        assert prediction.passes == 1
    purelib = Path(sysconfig.get_path("purelib"))
    size = sum(file.stat().st_size for file in purelib.rglob("*") if file.is_file())
    packages = len(list(importlib.metadata.distributions()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{len(answers)} frames: the tokens of the model")
    print(f"{packages} packages, {size / 1e6:.0f} MB; peak memory {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    (write if arguments.write else compare)(arguments.folder)

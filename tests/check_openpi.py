"""The released `openpi-client` against a running `openvla serve` of the embedded policy: metadata, observations of
LIBERO, DROID and ALOHA, error frames.

Run by `make test-openpi`, where torch is (which starts the server), which runs it again where openpi-client is (numpy
below 2); no part of the test-suite.

    python tests/check_openpi.py PYTHON            # with openvla; PYTHON: of the environment of openpi-client
    python tests/check_openpi.py --ask HOST:PORT   # with openpi-client
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np


FRAMES = Path(__file__).resolve().parents[1] / "examples/frames"


def block() -> str:
    """That of docs/serving.md."""
    page = (FRAMES.parents[1] / "docs/serving.md").read_text()
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "openpi_client" in text]
    return found


def compare(python: str) -> None:
    from check_client import ROOT, start_server, stop

    from openvla import OpenVLAForActionPrediction

    frame = json.loads((FRAMES / "frames.json").read_text())[0]
    model = OpenVLAForActionPrediction.from_pretrained(ROOT).eval()
    expected = model.predict_action(str(FRAMES / frame["file"]), frame["instruction"]).tolist()
    server, url = start_server()
    try:
        command = [python, __file__, "--ask", url.removeprefix("http://")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    finally:
        stop(server)
    *lines, found = done.stdout.splitlines() or [""]
    print("\n".join(lines))
    assert done.returncode == 0, done.stdout
    assert json.loads(found) == expected, (found, expected)
    print("the actions of the model")


def ask(address: str) -> None:
    from openpi_client import image_tools
    from openpi_client.websocket_client_policy import WebsocketClientPolicy
    from PIL import Image

    host, _, port = address.partition(":")
    policy = WebsocketClientPolicy(host, int(port))
    metadata = policy.get_server_metadata()
    print(f"openpi-client {importlib.metadata.version('openpi-client')}, numpy {np.__version__}")
    print({name: metadata[name] for name in ("model", "unnorm_keys", "cameras", "action_dim", "chunk", "hz")})
    assert metadata["cameras"] and metadata["action_dim"] == 7 and metadata["chunk"] == 1

    os.chdir(FRAMES.parents[1])
    exec(compile(block().replace('"127.0.0.1", 8000', f'"{host}", {port}'), "docs/serving.md", "exec"), {})

    frame = json.loads((FRAMES / "frames.json").read_text())[0]
    image = np.asarray(Image.open(FRAMES / frame["file"]).convert("RGB"))
    words, wrist, resized = frame["instruction"], np.zeros_like(image), image_tools.resize_with_pad(image, 224, 224)
    answer = policy.infer({"observation/image": image, "prompt": words})
    actions = answer["actions"]
    assert actions.shape == (1, 7) and np.isfinite(actions).all() and answer["server_timing"]["infer_ms"] > 0
    droid = {
        "observation/exterior_image_1_left": resized,
        "observation/wrist_image_left": resized,
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": np.zeros(1),
    }
    high = np.moveaxis(image_tools.convert_to_uint8(resized), -1, 0)
    aloha = {"state": np.zeros(14), "images": {"cam_high": high, "cam_left_wrist": high, "cam_right_wrist": high}}
    shaped = {
        "LIBERO": {"observation/image": image, "observation/wrist_image": wrist, "observation/state": np.zeros(8)},
        "LIBERO, the image alone": {"observation/image": image, "observation/state": np.zeros(8)},
        "DROID": droid,
        "ALOHA": aloha,
        "a camera nobody knows": {"observation/elbow": image, "observation/image": image},
        "no image": {"observation/state": np.zeros(8)},
        "a state of text": {"observation/image": image, "committed": "far"},
        "an image of floats": {"observation/image": np.full((8, 8, 3), np.nan)},
    }
    for name, observation in shaped.items():
        try:
            found = policy.infer({**observation, "prompt": words})["actions"]
            assert found.shape == (1, 7) and np.isfinite(found).all()
            print(f"{name}: actions {found.shape}")
        except RuntimeError as error:  # what this client makes of a text frame
            print(f"{name}: refused, {str(error).splitlines()[-1][:220]}")
            assert "Traceback" not in str(error)
    for wrong in ({}, {"prompt": words}, {"observation/image": image, "prompt": ""}):
        try:
            policy.infer(wrong)
        except RuntimeError:
            continue
        raise SystemExit(f"{list(wrong)} got an action")
    again = policy.infer({"observation/image": image, "prompt": words})["actions"]  # over the same connection
    assert np.array_equal(again, actions)
    print(json.dumps(actions[0].tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python_or_address")
    parser.add_argument("--ask", action="store_true")
    arguments = parser.parse_args()
    (ask if arguments.ask else compare)(arguments.python_or_address)

"""Run by another interpreter: a line of JSON in, a line of JSON out. Knows openvla of any version, or none.

`{"shape", "image", "instruction"}` -> `{"actions"}`, in the units of the dataset.
"""

import base64
import json
import sys
from typing import Any


def open_model(settings: dict[str, Any]) -> Any:
    """predict(image, instruction) -> action."""
    import torch

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = "cuda" if settings["device"] == "auto" and torch.cuda.is_available() else settings["device"]
    device = "cpu" if device == "auto" else device
    loading = {} if settings["dtype"] == "auto" else {"torch_dtype": getattr(torch, settings["dtype"])}
    key = settings["unnorm_key"]
    try:
        from openvla import OpenVLAForActionPrediction
    except ImportError:
        from PIL import Image
        from transformers import AutoModelForVision2Seq, AutoProcessor

        code = {"trust_remote_code": True}
        processor = AutoProcessor.from_pretrained(settings["model"], **code)
        model = AutoModelForVision2Seq.from_pretrained(settings["model"], **loading, **code).to(device).eval()

        def predict(image: Any, instruction: str) -> Any:
            prompt = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
            inputs = processor(prompt, Image.fromarray(image)).to(device, dtype=model.dtype)
            return model.predict_action(**inputs, unnorm_key=key, do_sample=False)

        return predict
    model = OpenVLAForActionPrediction.from_pretrained(settings["model"], **loading).to(device).eval()
    return lambda image, instruction: model.predict_action(image, instruction, unnorm_key=key)


def main() -> None:
    import numpy as np

    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    predict = open_model(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pixels = np.frombuffer(base64.b64decode(request["image"]), np.uint8).reshape(request["shape"])
        action = np.asarray(predict(pixels, request["instruction"]))
        print(json.dumps({"actions": action.tolist()}), file=out, flush=True)


if __name__ == "__main__":
    main()

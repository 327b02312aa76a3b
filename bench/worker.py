"""Run by another interpreter: a line of JSON in, a line of JSON out. Knows openvla of any version, or none.

`{"shape", "image", "instruction"}` -> `{"actions", "ms"}`: in the units of the dataset, and from raw image to them.
"""

import base64
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def original_classes(code: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the code in the model's folder; or registers that of the folder `code`, as
    its README does: configuration_prismatic.py, modeling_prismatic.py, processing_prismatic.py."""
    import transformers

    if code is None:
        return {"trust_remote_code": True}
    folder = Path(code)
    sys.path.insert(0, str(folder.parent))
    parts = ("configuration", "modeling", "processing")
    configuration, modeling, processing = (importlib.import_module(f"{folder.name}.{part}_prismatic") for part in parts)
    config = configuration.OpenVLAConfig
    transformers.AutoConfig.register("openvla", config)
    transformers.AutoImageProcessor.register(config, processing.PrismaticImageProcessor)
    transformers.AutoProcessor.register(config, processing.PrismaticProcessor)
    transformers.AutoModelForVision2Seq.register(config, modeling.OpenVLAForActionPrediction)
    return {}


def size_towers(folder: Path) -> None:
    """Towers of the sizes of config.json (`timm_model_kwargs`), which the original's code does not read."""
    config = json.loads((folder / "config.json").read_text()) if folder.is_dir() else {}
    if not config.get("timm_model_kwargs"):
        return
    import timm

    create, sizes = timm.create_model, dict(zip(config["timm_model_ids"], config["timm_model_kwargs"]))
    timm.create_model = lambda name, *values, **named: create(name, *values, **{**named, **sizes[name]})


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

        code = original_classes(settings["code"])
        size_towers(Path(settings["model"]))
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
        started = time.perf_counter()
        action = np.asarray(predict(pixels, request["instruction"]))  # on the host: nothing is computed any more
        milliseconds = 1000 * (time.perf_counter() - started)
        print(json.dumps({"actions": action.tolist(), "ms": milliseconds}), file=out, flush=True)


if __name__ == "__main__":
    main()

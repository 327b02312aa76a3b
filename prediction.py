"""What `openvla predict` does: one prediction, whose mistakes are found before the weights are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .action_spec import action_record, spec_of
from .action_tokenizer import check_state_of_one, resolve_unnorm_key
from .cameras_openvla import find_cameras
from .device import torch_device
from .hub import config_of, model_folder, statistics_of, variant_of
from .options.prediction import PredictOptions
from .pixels_openvla import load_image
from .policy import load_model
from .prompts_openvla import read_instruction


def predict(options: PredictOptions) -> dict[str, Any]:
    """The prediction as a record, see `action_record`.

    Raises:
        FileNotFoundError: If a frame or the model is not there.
        ValueError: If a frame is damaged, frames or state are not what the model sees, or units are not known.
    """
    device = torch_device(options.device)
    read_instruction(options.instruction)
    state = None if options.state is None else read_numbers("state", options.state)
    folder = Path(model_folder(options.model))
    variant = variant_of(folder, options.action_head, options.action_chunk)
    config = config_of(folder, **variant)
    paths = read_frames(options.image, config.camera_names)
    frames: Any = {camera: load_image(path) for camera, path in paths.items()}
    if list(frames) == [""]:
        frames = frames[""]
    check_state_of_one(state, config.proprio_dim)
    statistics = statistics_of(folder, config)
    unnorm_key = resolve_unnorm_key(statistics, options.unnorm_key)
    loading = {"device": device, "dtype": options.dtype, "quantization": options.quantization, **variant}
    model = load_model(str(folder), **loading)
    prediction = model.predict_action(frames, options.instruction, unnorm_key=unnorm_key, state=state, return_dict=True)
    image = paths[""] if "" in paths else paths
    context = {"instruction": options.instruction, "image": image, "model": options.model}
    return action_record(prediction, spec_of(statistics, unnorm_key), unnorm_key=unnorm_key, **context)


def read_frames(given: Sequence[str], camera_names: Sequence[str]) -> dict[str, str]:
    """`{camera: path}` of frames as they are given, CAMERA=PATH each; a path alone, for a model of one camera, has the
    name "".

    Raises:
        ValueError: If they are not those that the model sees.
    """
    found: dict[str, str] = {}
    for text in given:
        camera, equals, path = text.partition("=")
        if not equals or Path(text).is_file():  # of a file that has the sign in its name
            camera, path = "", text
        if camera in found:
            raise ValueError(f"image='{text}': {camera or 'a frame without the name of its camera'} is given twice.")
        found[camera] = path
    sees = f"The model sees {', '.join(camera_names)}"
    if "" in found:
        if len(found) == len(camera_names) == 1:
            return found
        example = " ".join(f"--image {name}=PATH" for name in camera_names)
        raise ValueError(f"image='{found['']}': {sees}, give each its frame by name: {example}.")
    used = find_cameras(found, camera_names)
    if surplus := [camera for camera in found if camera not in used]:
        raise ValueError(f"image: {sees}, and '{surplus[0]}' is none of these: leave it out.")
    return found


def read_numbers(name: str, text: str) -> list[float]:
    """Numbers with commas between them; a `ValueError` for anything else."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}='{text}': expected numbers with commas between them, such as 0.1,-0.2.") from error

"""Fields of runtime.json, and what each holds: a file that was changed or cut is refused before it acts otherwise."""

from collections.abc import Mapping
from typing import Any

from .choices_openvla import check_choice


NONE = type(None)
FIELDS: dict[str, Any] = {
    "model": str,
    "dtype": str,
    "action_head": str,
    "config": {
        "llm_max_length": int,
        "pad_token_id": (int, NONE),
        "image_token_id": int,
        "empty_token_id": (int, NONE),
        "action_vocab_size": int,
        "n_action_bins": int,
        "action_chunk": int,
        "proprio_dim": (int, NONE),
        "text_config": {
            "model_type": str,
            "bos_token_id": (int, NONE),
            "eos_token_id": (int, list, NONE),
            "vocab_size": int,
        },
    },
    "num_patches": int,
    "camera_names": list,
    "normalization": dict,
    "constant_state": str,
    "pixels": {
        "use_fused_vision_backbone": bool,
        "image_resize_strategy": str,
        "input_sizes": list,
        "interpolations": list,
        "means": list,
        "stds": list,
        "do_resize": bool,
        "do_rescale": bool,
        "rescale_factor": (int, float),
        "do_normalize": bool,
        "resize_filter": (str, NONE),
        "center_crop": (int, float, NONE),
        "jpeg_quality": (int, NONE),
    },
    "prompt_template": str,
    "statistics": dict,
    "files": dict,
}


def check_fields(content: Mapping[str, Any], expected: Mapping[str, Any] = FIELDS, place: str = "") -> None:
    """Raise a `KeyError`, `TypeError` or `ValueError` where a field is missing or holds something else."""
    for name, kinds in expected.items():
        value = content[name]
        if isinstance(kinds, Mapping):
            check_fields(value, kinds, f"{place}{name}.")
        elif type(value) not in (kinds if isinstance(kinds, tuple) else (kinds,)) or value == []:
            raise TypeError(f"{place}{name} is {value!r:.100}")
    if expected is FIELDS:
        if "{instruction}" not in content["prompt_template"]:
            raise TypeError("prompt_template has no place for the {instruction}")
        check_choice("constant_state", content["constant_state"], ("zero", "clip"))
        check_choice("action_head", content["action_head"], ("tokens",))

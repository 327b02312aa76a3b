"""Fields of runtime.json, and what each holds: a file that was cut, or holds what no export writes, is refused before
it acts otherwise. What an export could have written (other statistics, another template) is taken as it is."""

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
        check_counts_and_ids(content)
        if "{instruction}" not in content["prompt_template"]:
            raise TypeError("prompt_template has no place for the {instruction}")
        check_choice("constant_state", content["constant_state"], ("zero", "clip"))
        check_choice("action_head", content["action_head"], ("tokens",))
        check_choice("dtype", content["dtype"], ("float32", "float16", "int8"))  # decides about drafts


def check_counts_and_ids(content: Mapping[str, Any]) -> None:
    """Raise a `TypeError` for counts below 1, ids that are of no token, or names of cameras that are no texts."""
    config, text = content["config"], content["config"]["text_config"]
    counts = {name: config[name] for name in ("llm_max_length", "action_vocab_size", "n_action_bins", "action_chunk")}
    counts |= {"num_patches": content["num_patches"], "vocab_size": text["vocab_size"]}
    counts |= {"proprio_dim": config["proprio_dim"], "max_position_embeddings": text.get("max_position_embeddings")}
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise TypeError(f"{name} is {value!r:.100}")
    for name in ("pad_token_id", "image_token_id", "empty_token_id"):
        if config[name] is not None and not 0 <= config[name] < text["vocab_size"]:
            raise TypeError(f"{name} is {config[name]}, of {text['vocab_size']} tokens")
    if config["action_vocab_size"] > text["vocab_size"]:
        raise TypeError(f"action_vocab_size is {config['action_vocab_size']}, of {text['vocab_size']} tokens")
    if not all(isinstance(name, str) for name in content["camera_names"]):
        raise TypeError(f"camera_names is {content['camera_names']!r:.100}")
    if not content["pixels"]["rescale_factor"] > 0:
        raise TypeError(f"pixels.rescale_factor is {content['pixels']['rescale_factor']}")

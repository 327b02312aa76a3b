"""The README.md of a Hub folder: what the model is, how to load it, whose actions it speaks, which licence it has."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .action_spec import spec_of
from .action_tokenizer import get_action_stats
from .configuration_openvla import OpenVLAConfig
from .files_openvla import read_json


WITH_CODE = """OpenVLA: an image and an instruction go in, a robot action comes out. This folder carries its own code.

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({quoted}, trust_remote_code=True, dtype="auto").eval()
processor = AutoProcessor.from_pretrained({quoted}, trust_remote_code=True)

prompt = processor.format_prompt("pick up the cup")
inputs = processor(prompt, {images})
action = model.predict_action(**inputs, unnorm_key={unnorm_key}{state})  # {shape} float64, units of that dataset
```

It needs `torch`, `torchvision`, `timm`{more} and `transformers` >= 5.4.
"""

WITHOUT_CODE = """OpenVLA: an image and an instruction go in, a robot action comes out.

```python
from openvla import OpenVLAForActionPrediction  # the Python package, which this folder does not carry
from PIL import Image

model = OpenVLAForActionPrediction.from_pretrained({quoted}, dtype="auto").eval()
action = model.predict_action({images}, "pick up the cup", unnorm_key={unnorm_key}{state})
# {shape} float64, units of that dataset
```

`openvla package OUT --weights {word}` writes a folder that loads without the package.
"""

ADAPTER = """OpenVLA: an image and an instruction go in, a robot action comes out. This folder holds a LoRA adapter of
{base}; the weights of that base are not in it.

```python
from openvla import OpenVLAForActionPrediction
from PIL import Image

model = OpenVLAForActionPrediction.from_pretrained({quoted}, dtype="auto").eval()  # the base, and the adapter on it
action = model.predict_action({images}, "pick up the cup", unnorm_key={unnorm_key}{state})
# {shape} float64, units of that dataset
```

On a base that is loaded already: `model.load_adapter({quoted})`. While the adapter is active, units, prompt form and
pixels are its own. `openvla merge {word} OUT` (with `--base BASE`, where the base is not found) makes one model of the
two.
"""

BODY = """
# {name}

{loading}
## Actions

`unnorm_key` says whose units the action has. {head}

| unnorm_key | action dimensions | episodes | steps | numbers of an action |
| --- | --- | --- | --- | --- |
{datasets}

## Built from

| part | what |
| --- | --- |
| weights | {source} |
| vision | {vision} (`{vision_backbone_id}`){sizes}, images `{image_resize_strategy}` |
| language model | `{hf_llm_id}` (`{llm_backbone_id}`), {layers} layers of width {width} |

The published language models and vision towers have licences of their own, which models fine-tuned from them inherit.
"""


def model_card(
    name: str,
    config: OpenVLAConfig,
    statistics: dict[str, Any],
    *,
    source: str | None = None,
    model_folder: Path | None = None,
    carries_code: bool = False,
    weights: str | None = None,
    adapter_of: str | None = None,
) -> str:
    """Text of a model card with YAML front matter.

    Args:
        name: Name of the model, also what the example loads.
        source: Hub id the weights come from.
        model_folder: Folder the weights come from; licence and base model are taken from its card if it has one.
        carries_code: Whether the code of the model is in the folder.
        weights: What the weights are, where `source` does not say it.
        adapter_of: Name of the base, for a folder that holds an adapter.
    """
    found = {}
    if model_folder is not None and (model_folder / "README.md").is_file():
        found = ModelCard.load(model_folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    licence = {key: found[key] for key in ("license", "license_name", "license_link") if key in found}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="robotics",
        tags=["vla", "robotics", "openvla"],
        base_model=source or found.get("base_model"),
        **licence,
    )
    rows = []
    for key, entry in statistics.items():
        known = (entry.get(count) for count in ("num_trajectories", "num_transitions"))  # nobody acts by them
        counts = [f"{count:,}" if isinstance(count, (int, float)) else "?" for count in known]
        dims = len(get_action_stats(statistics, key)["q01"])
        cells = [f"`{key}`", str(dims), *counts, spec_of(statistics, key).describe()]
        rows.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |")
    unnorm_key = "bridge_orig" if "bridge_orig" in statistics else next(iter(statistics))
    link = f"[{source}](https://huggingface.co/{source})" if source else None
    how = ADAPTER if adapter_of else WITH_CODE if carries_code else WITHOUT_CODE
    loading = how.format(
        quoted=_quoted(name),
        word=shlex.quote(name),
        base=link or adapter_of,
        unnorm_key=_quoted(unnorm_key),
        images=_images(config),
        more="".join(f", `{library}`" for library in _more_libraries(config, model_folder)),
        state="" if config.proprio_dim is None else ", state=state",
        shape=_shape(config, len(get_action_stats(statistics, unnorm_key)["q01"])),
    )
    body = BODY.format(
        name=" ".join(name.split()),
        loading=loading,
        head=_head(config),
        datasets="\n".join(rows),
        source=link or weights or "this folder",
        vision=", ".join(f"`{model_id}`" for model_id in config.timm_model_ids or []),
        vision_backbone_id=config.vision_backbone_id,
        sizes=", sizes of its own (`timm_model_kwargs`)" if any(config.timm_model_kwargs) else "",
        image_resize_strategy=config.image_resize_strategy,
        hf_llm_id=config.hf_llm_id,
        llm_backbone_id=config.llm_backbone_id,
        layers=config.text_config.num_hidden_layers,
        width=config.text_config.hidden_size,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _more_libraries(config: OpenVLAConfig, model_folder: Path | None) -> list[str]:
    """What a prediction needs beside the libraries of every model, by the head and the pixels of the folder."""
    settings = model_folder / "processor_config.json" if model_folder is not None else None
    pixels = read_json(settings).get("image_processor") if settings is not None and settings.is_file() else None
    of_pixels = isinstance(pixels, dict) and pixels.get("jpeg_quality") is not None
    return ["diffusers"] * (config.action_head == "diffusion") + ["simplejpeg"] * of_pixels


def _images(config: OpenVLAConfig) -> str:
    """What the example shows the model."""
    if len(config.camera_names) == 1:
        return 'Image.open("frame.png")'
    shown = (f"{_quoted(name)}: Image.open({_quoted(f'{name}.png')})" for name in config.camera_names)
    return f"{{{', '.join(shown)}}}"


def _quoted(text: str) -> str:
    """As Python's code writes a text, whatever quotes are in it."""
    return json.dumps(text, ensure_ascii=False)


def _shape(config: OpenVLAConfig, action_dim: int) -> str:
    return f"({action_dim},)" if config.action_chunk == 1 else f"({config.action_chunk}, {action_dim})"


def _head(config: OpenVLAConfig) -> str:
    """What the model predicts, and what it sees beside images."""
    said = f"The action head is `{config.action_head}`; one prediction is for {config.action_chunk} step(s)."
    if config.proprio_dim is not None:
        said += f" The model sees the robot's state as well: {config.proprio_dim} numbers, in the units of the dataset."
    return f"{said} FiLM lets the words of the prompt change the image features." if config.use_film else said

"""Arrows point down: cli -> {serving, evaluation, training, conversion} -> {data, presets} -> the flat files."""

import ast
from pathlib import Path

import pytest

from openvla.conversion.hub_folder import CONFIG_AUTO_MAP


ROOT = Path(__file__).resolve().parents[1]
FLAT_FILES = [
    "choices_openvla",
    "cameras_openvla",
    "tensors_openvla",
    "forks_openvla",
    "files_openvla",
    "oft_openvla",
    "configuration_openvla",
    "action_tokenizer",
    "jpeg_openvla",
    "pixels_openvla",
    "frames_openvla",
    "prompts_openvla",
    "image_processing_openvla",
    "processor_files_openvla",
    "processing_openvla",
    "products_openvla",
    "quantized_linear_openvla",
    "vision_openvla",
    "patches_openvla",
    "embeddings_openvla",
    "outputs_openvla",
    "sampling_openvla",
    "stages_openvla",
    "inputs_openvla",
    "decoding_openvla",
    "llama_openvla",
    "int8_linear_openvla",
    "float8_linear_openvla",
    "int4_linear_openvla",
    "compiled_openvla",
    "modules_openvla",
    "recordings_openvla",
    "parallel_openvla",
    "parallel_graphs_openvla",
    "graphs_openvla",
    "token_head_openvla",
    "parallel_heads_openvla",
    "action_heads_openvla",
    "quantization_openvla",
    "generation_openvla",
    "weights_openvla",
    "parts_openvla",
    "adapters_openvla",
    "adapter_state_openvla",
    "adapter_weights_openvla",
    "active_adapters_openvla",
    "loading_openvla",
    "modeling_openvla",
]
# Name -> floor. What stands on one floor does not import its neighbours; the flat files may import earlier ones.
FLOORS = {
    **{name: 0 for name in FLAT_FILES},
    "action_spec": 1,
    "device": 1,
    "extras": 1,
    "folders": 1,
    "observation": 1,
    "hub": 2,
    "options": 2,
    "plugins": 1,
    "model_card": 2,
    "published_names": 2,
    "policy": 2,
    "prediction": 3,
    "presets": 2,
    "data": 3,
    "bench": 4,
    "conversion": 4,
    "training": 4,
    "evaluation": 4,
    "serving": 4,
    "cli_options": 5,
    "cli_errors": 6,
    "cli_folders": 6,
    "cli": 7,
    "openvla_light": 0,
    "openvla_console": 8,
    "__main__": 8,
}


def imported_rooms(file: Path) -> set[str]:
    """First path component inside the package of everything a file imports from the package."""
    depth = len(file.relative_to(ROOT).parts)
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level and node.level < depth:
                continue  # inside its own room
            names = [f"openvla.{node.module}"] if node.level else [node.module]
            if names[0] in ("openvla", "openvla.None"):
                names = [f"openvla.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("openvla.")}
    return rooms


@pytest.mark.parametrize("room", FLOORS)
def test_imports_point_down(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    for file in files:
        for target in imported_rooms(file) & FLOORS.keys():
            both_flat = room in FLAT_FILES and target in FLAT_FILES
            assert (
                target == room
                or FLOORS[target] < FLOORS[room]
                or (both_flat and FLAT_FILES.index(target) < FLAT_FILES.index(room))
            ), f"{file.relative_to(ROOT)} imports {target}, which does not stand below it"


def test_flat_files_import_each_other_as_remote_code_must():
    """Only `from .module import name` is followed when a Hub repository's code is copied."""
    for name in FLAT_FILES:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in FLAT_FILES
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "openvla" for alias in node.names)


def test_entry_files_name_everything_they_need():
    """Of a local folder transformers 5.4 and 5.5 copy an entry file and what it imports itself, no more."""

    def named(module: str) -> set[str]:
        tree = ast.walk(ast.parse((ROOT / f"{module}.py").read_text()))
        return {str(node.module) for node in tree if isinstance(node, ast.ImportFrom) and node.level}

    for entry in {reference.split(".")[0] for reference in CONFIG_AUTO_MAP.values()}:
        needed = named(entry)
        while more := {further for module in needed for further in named(module)} - needed:
            needed |= more
        assert needed == named(entry), f"{entry}.py: name {needed - named(entry)} as well"


def test_every_room_has_a_floor():
    packages = {file.parent.relative_to(ROOT).parts[0] for file in ROOT.glob("*/__init__.py")}
    modules = {file.stem for file in ROOT.glob("*.py")} - {"__init__"}
    assert packages | modules <= FLOORS.keys()

"""Write two models that this package and the original's code both load, to time one against the other.

    python benchmarks/original_folders.py outputs/original
    openvla bench latency --model outputs/original/mid --against original=ENV/bin/python --original-code CODE ...

tiny: The smallest published form, saved by the original (tests/fixtures), with the sizes of its towers in config.json.
mid: 0.25 billion random weights, with the tokenizer and the pixels of tiny. Environment and code: docs/performance.md.
"""

import argparse
import json
import shutil
from pathlib import Path

from openvla.bench.mid import mid_model


FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
TINY = "tiny-openvla-fused"
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


def write_tiny(folder: Path, name: str = TINY) -> Path:
    """A published checkpoint whose config.json also tells the sizes of its towers."""
    shutil.copytree(FIXTURES / name, folder, copy_function=shutil.copyfile)
    sizes = json.loads((folder / "tiny_vision_sizes.json").read_text())["overrides"]
    config = json.loads((folder / "config.json").read_text())
    config["timm_model_kwargs"] = [sizes[model_id] for model_id in config["timm_model_ids"]]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_mid(folder: Path) -> Path:
    mid_model(folder)
    for name in PROCESSOR:
        shutil.copyfile(FIXTURES / TINY / name, folder / name)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Folder to write; its folders tiny and mid are not there yet.")
    out = parser.parse_args().out
    for written in (write_tiny(out / "tiny"), write_mid(out / "mid")):
        print(written)

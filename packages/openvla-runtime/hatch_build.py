"""Puts the files that `openvla_runtime` shares with `openvla` into wheel and sdist.

They stand once in the repository, at its root; `openvla_runtime/__init__.py` finds them there in a checkout.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


PACKAGE = "openvla_runtime"
SHARED = (
    "action_tokenizer", "cameras_openvla", "choices_openvla", "files_openvla", "forks_openvla", "frames_openvla",
    "jpeg_openvla", "pixels_openvla", "prompts_openvla", "tensors_openvla",
)  # fmt: skip


class SharedFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package, repository = Path(self.root, PACKAGE), Path(self.root).parents[1]
        if version == "editable" or (package / f"{SHARED[0]}.py").exists():  # an unpacked sdist holds them already
            return
        for name in SHARED:
            build_data["force_include"][str(repository / f"{name}.py")] = f"{PACKAGE}/{name}.py"
        if self.target_name == "sdist":
            build_data["force_include"][str(repository / "LICENSE")] = "LICENSE"

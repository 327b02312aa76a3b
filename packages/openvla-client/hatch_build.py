"""Puts the files that `openvla_client` shares with `openvla` into wheel and sdist.

They stand once in the repository; `openvla_client/__init__.py` finds them there in a checkout.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


PACKAGE = "openvla_client"
SHARED = ("action_spec.py", "serving/wire.py")


class SharedFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package, repository = Path(self.root, PACKAGE), Path(self.root).parents[1]
        if version == "editable" or (package / Path(SHARED[0]).name).exists():  # an unpacked sdist holds them already
            return
        for name in SHARED:
            build_data["force_include"][str(repository / name)] = f"{PACKAGE}/{Path(name).name}"
        if self.target_name == "sdist":
            build_data["force_include"][str(repository / "LICENSE")] = "LICENSE"

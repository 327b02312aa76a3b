"""The package without its root executed: `import openvla_light` first, then of `openvla` what is needed.

Python executes the `__init__.py` of a package before any module in it, and that of `openvla` registers the model with
transformers: 10 to 20 seconds (torch, torchvision, timm). Neither `openvla --help` nor a process that runs a simulator
needs it. So two packages are put into `sys.modules` without being executed; who takes a name from one of them
(`from openvla import load_image`) finds it executed then.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


PACKAGES = ("openvla", "openvla.data")


def put_off(name: str) -> ModuleType:
    """The package `name` in `sys.modules`, executed as soon as it is asked for one of its names."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None  # installed together with this module
    loader, package = spec.loader, importlib.util.module_from_spec(spec)

    def ask(attribute: str) -> Any:
        # What Python itself asks for (__warningregistry__, ...) is no reason.
        if attribute.startswith("__") and attribute not in ("__all__", "__version__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    vars(package)["__getattr__"] = ask
    sys.modules[name] = package
    return package


if "openvla" not in sys.modules:
    root, data = map(put_off, PACKAGES)
    vars(root)["data"] = data

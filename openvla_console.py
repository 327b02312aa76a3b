"""The console script `openvla`, outside of the package: it answers --help and wrong options before the package is
imported.

`import openvla` registers the model with transformers, which takes seconds (torch, torchvision, timm). A console script
inside the package could not do without, because Python executes the root `__init__.py` before any module in it. So the
root is put into `sys.modules` without being executed: `openvla.cli` and the dataclasses of options import as always.
`cli_options.execute_root` executes it when a verb begins to work.
"""

import importlib.util
import sys


def main() -> None:
    spec = importlib.util.find_spec("openvla")
    assert spec is not None  # installed together with this module
    sys.modules["openvla"] = importlib.util.module_from_spec(spec)
    from openvla.cli import main

    main()

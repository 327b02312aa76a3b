"""A head of a user's own in a folder that carries its code."""

import ast
import inspect
import re
from pathlib import Path

from ..action_heads_openvla import HEADS


def carry_head(folder: Path, name: str) -> None:
    """Copy the module of a head that is none of this package's to the flat files of `folder`, whose model imports it.

    Args:
        name: Of `HEADS`.

    Raises:
        ValueError: If the module imports of this package what the folder does not carry, or has the name of one of its
            files.
    """
    head = HEADS[name]
    source = inspect.getsourcefile(head)
    if source is None or head.__module__.startswith(f"{HEADS['tokens'].__module__.rpartition('.')[0]}."):
        return
    module = head.__module__.rpartition(".")[2]
    flat = {file.stem for file in folder.glob("*.py")}
    if module in flat:
        raise ValueError(f"'{source}' has the name of a file of this package: give the module of your head another.")
    text = Path(source).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for imported in names:
            own = imported.partition(".")[2] if imported.partition(".")[0] in ("", "openvla") else None
            if own is not None and not (isinstance(node, ast.ImportFrom) and node.level < 2 and own in flat):
                raise ValueError(
                    f"'{source}' imports {imported}, which a packaged folder does not carry: take what the head needs "
                    f"by `from openvla.FILE import ...`, FILE one of {', '.join(sorted(flat))}."
                )
    text = re.sub(r"^(\s*)from openvla\.(\w+) import", r"\1from .\2 import", text, flags=re.MULTILINE)
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    with open(folder / "modeling_openvla.py", "a", encoding="utf-8") as model:
        model.write(
            "\n\n# The head of this model\nfrom .action_heads_openvla import HEADS  # noqa: E402\n"
            f"from .{module} import {head.__name__}  # noqa: E402\n\n\nHEADS[{name!r}] = {head.__name__}\n"
        )

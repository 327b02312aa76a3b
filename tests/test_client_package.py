"""`packages/openvla-client` as a distribution: its own files and the shared ones, and nothing that needs torch."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import openvla_client
import pytest
from openvla_client import wire
from wheels import build

import openvla
from openvla.serving.auth import VARIABLE


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "packages/openvla-client"
OWN = {file.stem for file in (PACKAGE / "openvla_client").glob("*.py")}
ALLOWED = {"aiohttp", "msgpack", "numpy", "PIL", *sys.stdlib_module_names}

ASK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "timm", "openvla"):
            raise ModuleNotFoundError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import openvla_client, numpy
guard = openvla_client.Guard(lambda seen: seen, openvla_client.action_spec.usual_spec(7), hz=1, wait=60)
assert guard.step(numpy.arange(7.0)).action.tolist() == [0, 1, 2, 3, 4, 5, 6]
print(openvla_client.__file__)
"""


def shared_files() -> dict[str, Path]:
    tree = ast.parse((PACKAGE / "hatch_build.py").read_text())
    (shared,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHARED"
    )
    return {Path(name).stem: ROOT / name for name in ast.literal_eval(shared)}


def test_what_is_imported_is_there_and_light():
    shared, needed = shared_files(), set()
    for file in [*(PACKAGE / "openvla_client").glob("*.py"), *shared.values()]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{file.name} imports from above"
                needed.add(node.module)
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in ALLOWED, file.name
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, file.name
    assert needed - OWN == shared.keys()
    assert Path(wire.__file__) == ROOT / "serving/wire.py"
    assert openvla_client.__version__ == openvla.__version__
    assert openvla_client.async_client.VARIABLE == VARIABLE


def test_the_wheel_holds_the_shared_files(tmp_path):
    """From the checkout, and from the sdist."""
    pytest.importorskip("hatchling")
    source = build(PACKAGE, "sdist", tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    for number, origin in enumerate((PACKAGE, tmp_path / source.name.removesuffix(".tar.gz"))):
        with zipfile.ZipFile(build(origin, "wheel", tmp_path / f"wheel{number}")) as archive:
            names = {Path(name).stem: name for name in archive.namelist() if name.endswith(".py")}
            assert names.keys() == OWN | shared_files().keys()
            for stem, name in names.items():
                place = shared_files().get(stem, PACKAGE / "openvla_client" / f"{stem}.py")
                assert archive.read(name) == place.read_bytes()
            archive.extractall(tmp_path / f"installed{number}")
        command = [sys.executable, "-c", ASK, tmp_path / f"installed{number}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.strip() == str(tmp_path / f"installed{number}/openvla_client/__init__.py"), done.stderr
    assert not (PACKAGE / "openvla_client/wire.py").exists()  # nothing is left behind

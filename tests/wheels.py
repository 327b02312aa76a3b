"""Distributions of packages/, built as their users build them."""

import subprocess
import sys
from pathlib import Path


def build(source: Path, target: str, folder: Path) -> Path:
    arguments = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    done = subprocess.run(arguments, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return file

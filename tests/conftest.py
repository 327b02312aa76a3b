"""Fixtures all tests share. How a test starts a process: see processes.py."""

import os
import shutil
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Thread pools of parallel test workers would fight for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import processes  # noqa: E402 - after the environment is set
import pytest  # noqa: E402
import timm.optim  # noqa: E402
import torch  # noqa: E402
from tiny import TINY, TinyCheckpoint  # noqa: E402


def pytest_configure(config):
    """Servers for all test workers, which find them by the environment."""
    if processes.FOLDER not in os.environ:
        folder = os.environ[processes.FOLDER] = tempfile.mkdtemp(prefix="openvla-tests-")
        config.servers = processes.start_servers(folder)


def pytest_unconfigure(config):
    if hasattr(config, "servers"):
        config.servers.stdin.close()
        config.servers.wait()
        shutil.rmtree(os.environ.pop(processes.FOLDER))


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(params=TINY, ids=lambda checkpoint: checkpoint.name, scope="session")
def tiny_checkpoint(request) -> TinyCheckpoint:
    return request.param


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    """One loaded model for tests that do not change it."""
    return tiny_checkpoint.load()


@pytest.fixture(scope="session")
def tiny_processor(tiny_checkpoint):
    return tiny_checkpoint.processor()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Statistics of datasets are cached: not where the user's are."""
    os.environ["OPENVLA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def opengl() -> str:
    """The backend that renders here; skips where there is none."""
    from openvla.evaluation.rendering import opengl_backend

    try:
        return opengl_backend()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def muon() -> None:
    """Skips where the installed timm does not have it."""
    if "nmuon" not in getattr(timm.optim, "list_optimizers", list)():
        pytest.skip(f"timm {timm.__version__} has no Muon")

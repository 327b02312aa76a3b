"""Fixtures all tests share. How a test starts a process: see processes.py.

Imported by the process that distributes tests to workers too, which needs no torch: what does is imported in fixtures.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from functools import partial


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Thread pools of parallel test workers would fight for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import processes  # noqa: E402 - after the environment is set
import pytest  # noqa: E402


def pytest_configure(config):
    """Servers for all test workers, which find them by the environment."""
    if processes.FOLDER not in os.environ:
        folder = os.environ[processes.FOLDER] = tempfile.mkdtemp(prefix="openvla-tests-")
        config.servers = processes.start_servers(folder)
    if hasattr(config, "workerinput"):  # a test worker: no one asks for its exit code
        # The first that is registered is the last that is done: the interpreter is not taken apart, 3 seconds.
        atexit.register(os._exit, 0)


def pytest_unconfigure(config):
    if hasattr(config, "servers"):
        config.servers.stdin.close()
        config.servers.wait()
        shutil.rmtree(os.environ.pop(processes.FOLDER))


def pytest_collection(session):
    """Importing leaves next to no garbage: it is not looked for, a second of each worker."""
    gc.disable()
    os.environ.update(processes.NO_COMPILER)


def pytest_collection_finish(session):
    """Each training run collects garbage, half a second where the libraries' objects are looked through as well. New
    objects are looked through less often: a twentieth of all time."""
    for name in processes.NO_COMPILER:
        os.environ.pop(name, None)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.fixture(autouse=True)
def reproducible():
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def no_curves():
    """The picture that a run ends with takes as long as its few steps: `curves` is for tests that look at it."""
    with pytest.MonkeyPatch.context() as patch:
        if "openvla.training.run" in sys.modules:
            patch.setattr("openvla.training.run.plot_curves", lambda runs, path: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def parsed_once():
    """Each tokenizer.json is parsed once, see tokenizers_of_tests.py."""
    with pytest.MonkeyPatch.context() as patch:
        if "transformers" in sys.modules:
            from tokenizers_of_tests import ParsedOnce
            from transformers import tokenization_utils_tokenizers as library

            patch.setattr(library, "TokenizerFast", ParsedOnce())
        yield


@pytest.fixture
def curves(monkeypatch):
    """Runs draw their picture."""
    from openvla.training.curves import plot_curves

    monkeypatch.setattr("openvla.training.run.plot_curves", plot_curves)


@pytest.fixture(params=["tiny-openvla-fused", "tiny-openvla-siglip"], scope="session")
def tiny_checkpoint(request):
    """A `tiny.TinyCheckpoint`."""
    from tiny import TINY

    return next(checkpoint for checkpoint in TINY if checkpoint.name == request.param)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    """One loaded model for tests that do not change it."""
    return tiny_checkpoint.load()


@pytest.fixture(scope="session")
def tiny_processor(tiny_checkpoint):
    return tiny_checkpoint.processor()


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory):
    """Folder of the embedded policy in small: two blocks of everything, of width 32. Its random weights are so large
    that what it sees and reads decides its tokens."""
    import torch

    from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor

    root, folder = os.path.dirname(os.path.dirname(__file__)), tmp_path_factory.mktemp("small_policy")
    config = OpenVLAConfig.from_pretrained(root)
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 32}
    config.timm_model_kwargs = [{**tower, **sizes} for tower in config.timm_model_kwargs]
    config.text_config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8})
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config)
    for parameter in model.language_model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 6
    model.save_pretrained(folder)
    OpenVLAProcessor.from_pretrained(root).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_base(request, small_policy):
    """`BASE` of a module is the small policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request.module, "BASE", small_policy)
        yield


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
    import timm.optim

    if "nmuon" not in getattr(timm.optim, "list_optimizers", list)():
        pytest.skip(f"timm {timm.__version__} has no Muon")


@pytest.fixture
def float32_muon(muon, monkeypatch) -> None:
    """Muon for tests that are not about its products: CPUs without bfloat16 take ten times as long for them."""
    import timm.optim.muon
    import torch

    products = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", products)

"""Processes that are forked of one in which threads predict: workers of a DataLoader, `multiprocessing` on Linux."""

import os
import threading
import time

import pytest
from tiny import golden_image
from transformers import AutoModel

from openvla.forks_openvla import _LOCKS, lock_over_forks
from openvla.llama_openvla import _POOLING
from openvla.modules_openvla import _SWITCH
from openvla.pixels_openvla import _READING
from openvla.processing_openvla import _TOKENIZING


pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are of Unix"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def in_fork(check) -> bool:
    """What `check` says in a forked process."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("lock", [_READING, _TOKENIZING, _POOLING, _SWITCH])
def test_a_lock_that_another_thread_holds_is_free_in_a_fork(lock):
    held = threading.Event()

    def hold():
        with lock:
            held.set()
            time.sleep(0.05)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    assert in_fork(lambda: lock.acquire(blocking=False))
    thread.join()
    assert lock.acquire(blocking=False)  # here as well
    lock.release()


def test_a_lock_of_an_object():
    """Such as that of a policy, which reads pictures while it is held."""
    own, held = lock_over_forks(), threading.Event()

    def hold():
        with own:
            held.set()
            time.sleep(0.05)
            with _READING:
                pass

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    assert in_fork(lambda: own.acquire(blocking=False) and _READING.acquire(blocking=False))
    thread.join()
    before, other = len(_LOCKS), lock_over_forks()
    assert len(_LOCKS) == before + 1
    del other
    assert len(_LOCKS) == before


def test_a_model_that_another_thread_predicts_with_learns_in_a_fork(small_policy, monkeypatch):
    """It stayed in evaluation mode, for a prediction that never ended there."""
    model = AutoModel.from_pretrained(small_policy).train()
    encode, inside, go_on = model.encode_images, threading.Event(), threading.Event()

    def wait(*arguments):
        inside.set()
        assert go_on.wait(10)
        return encode(*arguments)

    monkeypatch.setattr(model, "encode_images", wait)
    thread = threading.Thread(target=model.predict_action, args=(golden_image(0), "open the drawer"))
    thread.start()
    assert inside.wait(10)
    assert not model.training
    assert in_fork(lambda: model.training and not model.eval().training and model.train().projector.training)
    go_on.set()
    thread.join()
    assert model.training

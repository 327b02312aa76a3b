"""Folders: one process at a time, complete or not at all; weights told apart by their content."""

import errno
import hashlib
import os
import signal
from contextlib import nullcontext, suppress
from pathlib import Path

import huggingface_hub
import processes
import pytest
import torch
from safetensors.torch import save_file

from openvla.folders import (
    OURS,
    WORK,
    locked,
    move_into,
    new_folder,
    remove_working_folder,
    weights_digest,
    whole_file,
    working_folder,
    write_json,
    write_text,
)


HOLD = """
import sys, time
from openvla.folders import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path / 'out'`."""
    reading, writing = os.pipe()
    process = processes.start(HOLD, tmp_path / "out", stdout=writing)
    os.close(writing)
    with open(reading) as said:
        assert said.readline() == "held\n"
    yield process
    process.kill()


def test_a_second_process_is_refused(tmp_path, holder):
    with pytest.raises(BlockingIOError, match="Another process is writing"), locked(tmp_path / "out"):
        pass


def test_a_killed_process_locks_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    with locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path):
    """safetensors 0.8 makes files that no other user can load, whatever the umask."""
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            with new_folder(tmp_path / oct(mask)) as folder:
                save_file({"one": torch.zeros(1)}, folder / "model.safetensors")
                (folder / "model.safetensors").chmod(0o600)
                write_text(folder / "config.json", "{}")
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / oct(mask)).iterdir()}
        assert modes == {"config.json": mode, "model.safetensors": mode}


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    """A full disk left a part of it behind, for a plot under its own name, and named no file."""
    file = tmp_path / "figures.json"
    write_text(file, "old")
    with pytest.raises(OSError, match=r"\[Errno 28\] .*figures.json"), whole_file(file) as part:
        part.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="encoder error -2"), whole_file(file):  # of Pillow, which gives no number
        raise OSError("encoder error -2")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["figures.json"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".out.unfinished" / WORK).mkdir(parents=True)
    (tmp_path / ".out.unfinished" / OURS).touch()
    (tmp_path / ".out.unfinished" / WORK / "half").touch()
    with new_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_removed_that_was_not_made_here(tmp_path):
    """Whatever has the name of a working folder or of a lock, but is not marked as ours."""
    place, lock = tmp_path / ".out.unfinished", tmp_path / ".out.lock"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / OURS).touch()
    for make in (
        lambda: place.write_text("mine"),
        lambda: (place.mkdir(), (place / "mine").touch()),
        lambda: place.symlink_to(tmp_path / "elsewhere"),
    ):
        make()
        for refused in (new_folder(tmp_path / "out"), working_folder(place)):
            with pytest.raises(FileExistsError, match="was not made here: move it away"), refused:
                pass
        assert os.path.lexists(place)
        if place.is_dir() and not place.is_symlink():
            (place / "mine").unlink()
            remove_working_folder(place)
        else:
            place.unlink()
    assert (tmp_path / "elsewhere" / OURS).exists()
    lock.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.lock' is in the way of the lock"), locked(tmp_path / "out"):
        pass
    assert lock.read_text() == "mine"


@pytest.mark.parametrize("stop", range(6))
def test_a_working_folder_is_ours_however_far_its_removal_came(stop, tmp_path, monkeypatch):
    place, left = tmp_path / "work", [stop]
    for name in ("unlink", "rmdir"):
        once = getattr(Path, name)

        def stopped(self, *args, once=once, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            once(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, stopped)
    with suppress(KeyboardInterrupt), working_folder(place) as work:
        (work / "file").touch()
        (place / "beside").touch()
    left[0] = -1
    remove_working_folder(place)
    assert not place.exists()


def test_overwriting_keeps_other_files_and_drops_older_weights(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    kept = ["model_before.safetensors", "video.mp4"]
    for name in ("config.json", "model-00001-of-00002.safetensors", *kept):
        (out / name).write_text("old")
    with pytest.raises(ValueError, match="not empty"), new_folder(out):
        pass
    with new_folder(out, overwrite=True) as folder:
        write_json(folder / "config.json", {"new": True})
        (folder / "model.safetensors").write_text("new")
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", *kept]
    assert "new" in (out / "config.json").read_text()


@pytest.mark.parametrize("adapter", [False, True])
def test_stopped_while_files_are_replaced_a_folder_neither_loads_nor_is_finished(adapter, tmp_path, monkeypatch):
    """After each single file: `MARKS` are there when all the rest is."""
    names = ["README.md", "weights", "dataset_statistics.json", "adapter_config.json" if adapter else "config.json"]
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    for name in [*names, "adapter_model.safetensors"]:
        (tmp_path / "out" / name).write_text("old")
    replace, left = os.replace, [0]

    def stopped(*paths):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", stopped)
    for count in range(len(names) + 1):
        for name in names:
            (tmp_path / "work" / name).write_text("new")
        left[0] = count
        with pytest.raises(KeyboardInterrupt) if count < len(names) else nullcontext():
            move_into(tmp_path / "work", tmp_path / "out")
        if count == len(names):
            break
        there = {path.name for path in (tmp_path / "out").iterdir()}
        assert "dataset_statistics.json" not in there and "adapter_model.safetensors" not in there
        if names[3] in there:
            assert all((tmp_path / "out" / name).read_text() == "new" for name in names if name in there)
            assert there == set(names) - {"dataset_statistics.json"}
    assert all((tmp_path / "out" / name).read_text() == "new" for name in names)


def test_weights_are_told_apart_by_their_content(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    before = weights_digest(tmp_path)
    assert len(before) == 32 and weights_digest(str(tmp_path)) == before
    (tmp_path / "config.json").write_text("{}")
    os.utime(file)
    assert weights_digest(tmp_path) == before  # neither other files nor time stamps
    file.write_bytes(bytes(999) + b"\1")
    assert weights_digest(tmp_path) != before
    with pytest.raises(FileNotFoundError, match="no weights"):
        weights_digest(tmp_path.parent)


def test_weights_in_a_folder_below_are_weights(tmp_path):
    """They load, and were said not to be there; beside others they did not count."""
    (tmp_path / "parts").mkdir()
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "parts/1.safetensors"}})
    (tmp_path / "parts" / "1.safetensors").write_text("first")
    first = weights_digest(tmp_path)
    (tmp_path / "parts" / "1.safetensors").write_text("other")
    assert weights_digest(tmp_path) != first
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": None})
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        weights_digest(tmp_path)


def test_weights_of_a_hub_id_are_those_in_the_cache(tmp_path, monkeypatch):
    """There the file of a large weight is called by its digest, so nothing is read; equal to that of a folder."""
    content = bytes(1000)
    cache = tmp_path / "models--me--my-robot"
    blob = cache / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = cache / "snapshots" / ("0" * 40)
    for folder in (blob.parent, snapshot, cache / "refs", tmp_path / "local"):
        folder.mkdir(parents=True)
    blob.touch()
    (cache / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").symlink_to(blob)
    (tmp_path / "local" / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights_digest("me/my-robot") == weights_digest(tmp_path / "local")
    for missing in ("me/other", "not/a/repository", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="no folder, and no Hub repository"):
            weights_digest(missing)


def test_where_nothing_may_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"), locked(tmp_path / "file"):
        pass
    with pytest.raises(OSError, match="Cannot write"), locked(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ValueError, match="installed packages"), locked(tmp_path / "site-packages" / "openvla" / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

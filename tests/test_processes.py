"""What forked programs have in common with those of a fresh interpreter."""

import os
import signal
import subprocess
import sys

import pytest
from processes import run, run_ranks, start


SHOWN = """
import os, sys
print(sys.argv[1:], __name__, os.getcwd(), os.environ.get("MARK"), "PATH" in os.environ, end=" ")
print(sys.stdin.read() == "", flush=True)
print("said", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "end", ["", "sys.exit(3)", "sys.exit('in words')", "raise KeyError('gone')", "os.kill(os.getpid(), 9)"]
)
def test_a_program_shows_and_ends_as_in_a_fresh_interpreter(end, tmp_path):
    more = {"cwd": tmp_path, "env": {"MARK": "1"}}
    fresh = subprocess.run(
        [sys.executable, "-c", SHOWN + end, "a", "b c"],
        **more,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    forked = run(SHOWN + end, "a", "b c", server="libraries", **more)
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1] == fresh.stderr.splitlines()[-1]


def test_what_has_been_imported():
    code = "import sys; print([name in sys.modules for name in ('timm', 'transformers', 'openvla', 'h5py', 'pytest')])"
    assert run(code, server="libraries").stdout == "[True, False, False, False, False]\n"
    assert run(code).stdout.startswith("[True, True, True,")


def test_a_program_is_killed_or_too_late():
    reading, writing = os.pipe()
    process = start("print('here', flush=True); import time; time.sleep(600)", server="libraries", stdout=writing)
    os.close(writing)
    try:
        with open(reading) as said:
            assert said.readline() == "here\n" and process.running()
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL and not process.running()
    with pytest.raises(TimeoutError):
        run("import time; time.sleep(600)", server="libraries", timeout=0.5)


def test_ranks_find_each_other():
    code = (
        "import torch; torch.distributed.init_process_group('gloo'); x = torch.ones(1) + torch.distributed.get_rank();"
    )
    done = run_ranks(code + "torch.distributed.all_reduce(x); print(x.item())", server="libraries")
    assert [(rank.returncode, rank.stdout) for rank in done] == [(0, "3.0\n")] * 2, done

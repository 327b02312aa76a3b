"""`openvla_client` as its wheel gives it, in an environment of its own, against a running `openvla serve`: the actions
of the model over both protocols, and a guard that stands still when the server goes.

Run by `make test-client`, where torch is (which starts the server and compares), which runs it again where torch is
not; no part of the test-suite.

    python tests/check_client.py PYTHON              # with openvla; PYTHON: of the environment of the client
    python tests/check_client.py --ask URL FOLDER    # without torch
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FRAMES = ROOT / "examples/frames"


def frames() -> list[dict]:
    return json.loads((FRAMES / "frames.json").read_text())


def start_server(*options: str) -> tuple[subprocess.Popen, str]:
    """`openvla serve` of the embedded policy on a free port, once it answers, and its address."""
    command = [Path(sys.executable).with_name("openvla"), "serve", "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "OPENVLA_API_KEY"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://[\w.]+:\d+", line):
            return server, found[0]
    raise SystemExit(f"openvla serve ended with {server.wait()}")


def stop(server: subprocess.Popen) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()


def compare(python: str) -> None:
    from openvla import OpenVLAForActionPrediction

    model = OpenVLAForActionPrediction.from_pretrained(ROOT).eval()
    expected = [model.predict_action(str(FRAMES / frame["file"]), frame["instruction"]).tolist() for frame in frames()]
    server, url = start_server()
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [python, __file__, "--ask", url, folder]
            with subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as client:
                assert client.stdin is not None and client.stdout is not None
                answers = json.loads(client.stdout.readline())
                for scheme, actions in answers.items():
                    assert actions == expected, (scheme, actions, expected)
                print(f"{len(expected)} frames over {' and '.join(answers)}: the actions of the model", flush=True)
                server.kill()
                server.wait()
                client.stdin.write("the server is gone\n")
                client.stdin.flush()
                print(client.stdout.read(), end="")
            assert client.returncode == 0
    finally:
        stop(server)


def ask(url: str, folder: Path) -> None:
    there = [name for name in ("torch", "transformers", "openvla") if importlib.util.find_spec(name)]
    assert not there, f"{there} are installed: this environment is to be without them"

    import openvla_client

    installed = Path(openvla_client.__file__).parent
    assert installed == Path(sysconfig.get_path("purelib")) / "openvla_client", f"{installed} is no installation"
    answers = {}
    for scheme in ("ws", "http"):
        with openvla_client.connect(url.replace("http", scheme), wait=60) as client:
            found = [client.act(FRAMES / frame["file"], frame["instruction"]).actions for frame in frames()]
            answers[scheme] = [actions[0].tolist() for actions in found]
    client = openvla_client.connect(url.replace("http", "ws"))
    audit = openvla_client.Audit(folder / "audit.jsonl")
    frame = frames()[0]
    seen = {"images": FRAMES / frame["file"], "instruction": frame["instruction"]}
    patient = client.guard(hz=0.1, wait=60, fallback="hold")
    command = patient.step(seen)
    assert command.source == "answer" and command.action.tolist() == answers["ws"][0], command
    patient.close()
    print(json.dumps(answers), flush=True)
    sys.stdin.readline()
    guard, states = client.guard(hz=5, fallback="hold", audit=audit.write, dead_after=1.5), []
    guard.reset(start=[0, 0, 0, 0, 0, 0, 1])
    while guard.state != "DEAD":
        command = guard.step(seen)
        states += [command.state.value] * (command.state not in states[-1:])
        if command.state in ("STALLED", "DEAD"):
            assert command.source == "hold" and command.action[:6].tolist() == [0] * 6
        time.sleep(0.1)
    guard.close()
    client.close()
    audit.close()
    lines = (folder / "audit.jsonl").read_text().splitlines()
    print(f"the server was killed: {' -> '.join(states)}, held in {len(lines)} lines of the audit")
    purelib = Path(sysconfig.get_path("purelib"))
    size = sum(file.stat().st_size for file in purelib.rglob("*") if file.is_file())
    packages = len(list(importlib.metadata.distributions()))
    status = Path("/proc/self/status")  # ru_maxrss counts what the parent had when it forked
    peak = (
        [line.split(None, 1)[1] for line in status.read_text().splitlines() if "VmHWM" in line]
        if status.exists()
        else []
    )
    print(f"{packages} packages, {size / 1e6:.0f} MB; peak memory {''.join(peak) or 'unknown'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python_or_url")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--ask", action="store_true")
    arguments = parser.parse_args()
    if arguments.ask:
        ask(arguments.python_or_url, arguments.folder)
    else:
        compare(arguments.python_or_url)

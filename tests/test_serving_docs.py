"""docs/serving.md: every block is run, or checked by the program that it is for.

Against a server without torch (fake_serving.py) that stands where the page says. The block of openpi's client runs by
`make test-openpi`, those of nginx and Caddy are checked where these are installed.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import typer
from faulty_network import MAX_AGE, SPEC, WAIT, Faults, Simulation
from openvla_client import Guard, connect

from openvla.cli import app


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/serving.md"
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from fake_serving import FakeModel
from openvla.options.serving import ServeOptions
from openvla.serving.server import serve
model = FakeModel(("primary",), keys=("metaworld",), stated=True)
serve(ServeOptions(port=int(sys.argv[1])), load=lambda options: model)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_nothing_is_left_out():
    found = set(re.findall(r"^```(\w+)$", PAGE.read_text(), flags=re.MULTILINE))
    assert found == {"bash", "python", "mermaid", "caddy", "nginx", "ini"}
    lines = [shlex.split(line, comments=True)[0] for block in blocks("bash") for line in block.splitlines() if line]
    assert set(lines) == {"pip", "openvla", "curl", "jq", "python3", "export"}


@pytest.fixture(scope="module")
def port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = taken.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "OPENVLA_API_KEY"}
    server = processes.start(PROGRAM, found, env=environment)
    with connect(f"http://127.0.0.1:{found}", wait=300):
        yield found
    server.kill()


class Robot:
    """What the page calls `robot` and `camera`."""

    def __init__(self):
        self.executed, self.work = [], 4

    def has_work(self):
        self.work -= 1
        return self.work >= 0

    def gripper(self):
        return 1.0

    def position(self):
        return [0, 0, 0.3, 0, 0, 0, 0]

    def execute(self, action):
        assert action.shape == (7,)
        self.executed.append(action)

    def frame(self):
        return ROOT / "examples/frames/drawer-open-v3_step005.png"


def test_python_blocks(port, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)
    robot = Robot()
    names = {"robot": robot, "camera": robot}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks("python"):
        if "openpi_client" in block:
            compile(block, PAGE.name, "exec")
            continue
        exec(compile(block.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), PAGE.name, "exec"), names)
        ran += 1
        if "guard" not in names:
            names["client"].close()
    assert ran == 2 and len(robot.executed) == 4
    names["guard"].close()
    names["client"].close()
    names["audit"].close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and any(line["source"] == "answer" for line in lines)
    assert "primary" in capsys.readouterr().out
    (query,) = [block for block in blocks("bash") if block.startswith("jq")]
    if shutil.which("jq"):
        subprocess.run(query, shell=True, check=True)
    for field in re.findall(r"\.(\w+)", query.split(" audit.jsonl")[0]):
        assert field in lines[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(port):
    for block in blocks("bash"):
        for line in block.splitlines():
            if line.startswith("curl"):
                command = shlex.split(line.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
                found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
                assert len(found["actions"][0]) == 7
                return
    raise AssertionError("no curl")


def test_the_block_of_openpi_is_what_make_test_openpi_runs():
    import check_openpi

    assert check_openpi.block() in blocks("python")


def test_states_are_those_of_the_diagram():
    """Each arrow happens, and nothing else does."""
    (diagram,) = blocks("mermaid")
    drawn = set(re.findall(r"^ +(\w+) --> (\w+):", diagram, flags=re.MULTILINE))
    seen = set()
    faults = Faults(delay=0.05, slow=0.1, loss=0.1, half_open=0.01, kill=0.005, held_up=0.02, jump=0.005)
    for chunk in (1, 8):
        simulation, lines = Simulation(seed=chunk, faults=faults, chunk=chunk), []
        guard = Guard(simulation, SPEC, wait=WAIT, max_age=MAX_AGE, clock=simulation.clock, audit=lines.append)
        simulation.run(guard, 5000)
        for line, after in zip(lines, lines[1:]):
            assert after["step"] or after["state"] == "DEGRADED" or after["source"] == "answer"
            if after["step"] and line["state"] != after["state"]:
                seen.add((str(line["state"]), str(after["state"])))
    assert seen == drawn


def test_the_unit_of_systemd(tmp_path):
    (text,) = blocks("ini")
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str
    unit.read_string(text)
    program, verb, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "openvla"
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)
    if shutil.which("systemd-analyze"):
        here = text.replace(program, sys.executable)
        (tmp_path / "openvla.service").write_text(here)
        found = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / "openvla.service"], capture_output=True, text=True
        )
        assert "openvla.service" not in found.stderr, found.stderr


def test_proxies(tmp_path):
    (nginx,), (caddy,) = blocks("nginx"), blocks("caddy")
    for text in (nginx, caddy):
        assert text.count("{") == text.count("}") and "127.0.0.1:8000" in text
    if shutil.which("caddy"):
        (tmp_path / "Caddyfile").write_text(caddy)
        command = ["caddy", "adapt", "--config", tmp_path / "Caddyfile", "--adapter", "caddyfile"]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert "127.0.0.1:8000" in json.dumps(found)


@pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("openssl")), reason="needs nginx and openssl")
def test_through_nginx(port, tmp_path, monkeypatch):
    """TLS in front of the server: both protocols, and a large image."""
    import ssl

    import numpy as np

    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [*command.split(), "-keyout", tmp_path / "key", "-out", tmp_path / "pem"], check=True, capture_output=True
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        front = taken.getsockname()[1]
    (text,) = blocks("nginx")
    for here, there in (
        ("listen 443", f"listen 127.0.0.1:{front}"), ("robots.example.org", "localhost"),
        ("/etc/ssl/robots.pem", f"{tmp_path}/pem"), ("/etc/ssl/robots.key", f"{tmp_path}/key"),
        ("127.0.0.1:8000", f"127.0.0.1:{port}"),
    ):  # fmt: skip
        assert here in text
        text = text.replace(here, there)
    user = "" if os.geteuid() else "user root;"  # the folder is that of who tests
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"{user} pid {tmp_path}/pid; daemon off; error_log {tmp_path}/errors; events {{}} "
        f"http {{ access_log off; {places} {text} }}"
    )
    proxy = subprocess.Popen(["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        context = ssl.create_default_context(cafile=tmp_path / "pem")
        for scheme in ("wss", "https"):
            with connect(f"{scheme}://localhost:{front}", wait=30, ssl=context) as client:
                image = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)
                assert client.act(image, "open the drawer").actions.shape == (1, 7)
    finally:
        proxy.terminate()
        proxy.wait(30)

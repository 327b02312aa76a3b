"""`make test-fuzz`: a server of its own, thousands of bad requests over each protocol and below them, and what
schemathesis makes of its description. Prints what was refused, and the memory of the server before and after.

    python tests/check_serving.py --requests 10000 --schemathesis PATH
"""

import argparse
import collections
import itertools
import json
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from bad_requests import GOOD, bodies, damaged, packed
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from openvla.serving import wire
from openvla.serving.websocket import REALTIME


REFUSED = ("bad_request", "too_large")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
MOST_GROWTH = 64  # MiB that the server may have more after it all


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--schemathesis", help="its command; left out: not run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    command = [sys.executable, "-m", "openvla.cli", "serve", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        print(line.strip())
        address = re.search(r"http://(127\.0\.0\.1:\d+)", line)[1]
        fuzz(address, server.pid, given.requests, given.seed)
        if given.schemathesis:
            run_schemathesis(given.schemathesis, address)
        server.send_signal(signal.SIGTERM)
        print("stopped with exit code", server.wait(timeout=60))
        assert server.returncode == 0
    finally:
        server.kill()


def fuzz(address: str, pid: int, count: int, seed: int) -> None:
    with httpx.Client(base_url=f"http://{address}", timeout=60) as http:
        rng, few = np.random.default_rng(seed), max(count // 20, 20)
        for each in (few, count):
            begun, memory, asked = time.monotonic(), resident(pid), inferences(http)
            share = each * 3 // 10
            seen = collections.Counter({"post": over_post(http, rng, each - 3 * share)})
            for path in ("/", REALTIME):
                seen[path] = over_websocket(f"ws://{address}{path}", rng, share)
            seen["below"] = below(address, rng, share)
            assert inferences(http) == asked, "the model was asked for a wrong request"
            seconds = time.monotonic() - begun
            print(f"{seen.total()} bad requests ({dict(seen)}), all refused, none reached the model, {seconds:.0f} s")
            print(f"memory of the server: {memory:.0f} MiB before, {resident(pid):.0f} MiB after")
            assert each == few or resident(pid) < memory + MOST_GROWTH
        good, text = wire.pack(GOOD), wire.to_json(GOOD).encode()
        outcomes = collections.Counter(
            http.post("/act", content=damaged(rng, data), headers={"Content-Type": kind}).status_code
            for data, kind in [(good, "application/msgpack"), (text, "application/json")] * few
        )
        print(f"good requests with damaged bytes: {dict(outcomes)}")
        assert outcomes.keys() <= {200, 400, 413}
        answer = http.post("/act", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200 and http.get("/readyz").status_code == 200


def over_post(http: httpx.Client, rng: np.random.Generator, count: int) -> int:
    for kind, body in itertools.islice(bodies(rng), count):
        answer = http.post("/act", content=body, headers={"Content-Type": kind})
        assert answer.status_code in (400, 413) and answer.json()["code"] in REFUSED, (kind, body[:500], answer.text)
    return count


def over_websocket(url: str, rng: np.random.Generator, count: int) -> int:
    with connect(url, compression=None) as robot:
        robot.recv()
        for data in itertools.islice(packed(rng), count):
            robot.send(data)
            frame = robot.recv()
            assert isinstance(frame, str) and json.loads(frame)["code"] in REFUSED, (data[-500:], frame)
    return count


def below(address: str, rng: np.random.Generator, count: int) -> int:
    """What is no HTTP, and what is no WebSocket after it became one."""
    host, port = address.split(":")
    upgrade = (
        f"GET / HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()
    for number in range(count):
        with socket.create_connection((host, int(port)), timeout=60) as raw:
            noise = bytes(rng.integers(0, 256, rng.integers(1, 2000), np.uint8))
            sent = [
                noise,
                upgrade[: rng.integers(1, len(upgrade))],
                upgrade + noise,
                upgrade + b"\x82\xff" + (2**62).to_bytes(8, "big") + noise,  # a frame that is never complete
                upgrade + b"\x02\x85" + noise,  # a message in parts
                b"POST /act HTTP/1.1\r\nHost: " + address.encode() + b"\r\nContent-Length: 999999\r\n\r\n" + noise,
                b"POST /act HTTP/1.1\r\nHost: "
                + address.encode()
                + b"\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFF\r\n",
                b"GET /" + noise.hex().encode() * 40 + b" HTTP/1.1\r\n\r\n",
            ][number % 8]
            raw.settimeout(0.02)
            try:
                raw.sendall(sent)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(65536):
                    pass
            except OSError:  # it closed first, or says nothing
                pass
    with connect(f"ws://{address}/", compression=None, max_size=None) as robot:  # more than a message may have
        robot.recv()
        try:
            robot.send(secrets.token_bytes(wire.MOST_BYTES + 1))
            robot.recv()
        except ConnectionClosed:  # with 1009, where that arrives before the end
            pass
        else:
            raise AssertionError("A message above the limit was answered.")
    return count + 1


def resident(pid: int) -> float:
    """MiB."""
    status = open(f"/proc/{pid}/status").read()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def inferences(http: httpx.Client) -> float:
    found = re.search(r'openvla_stage_seconds_count{stage="infer"} (\S+)', http.get("/metrics").text)
    return float(found[1]) if found else 0.0


def run_schemathesis(command: str, address: str) -> None:
    arguments = ["run", f"http://{address}/openapi.json", "--checks", CHECKS, "--max-examples", "300", "--no-color"]
    configured = [command, "--config-file", str(Path(__file__).with_name("schemathesis.toml")), *arguments]
    done = subprocess.run(configured, text=True, capture_output=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "schemathesis found something"


if __name__ == "__main__":
    main()

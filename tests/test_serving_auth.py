"""Who may ask: the key, pages of other sites, foreign names."""

import pytest
from fake_serving import FakeModel
from starlette.testclient import TestClient, WebSocketDenialResponse

from openvla.options.serving import Limits
from openvla.serving.app import create_app
from openvla.serving.auth import VARIABLE, is_loopback, read_key
from openvla.serving.engine import Engine
from openvla.serving.server import check_address


KEY = "0123456789abcdef"
PATHS = ("/info", "/metrics", "/openapi.json")


def app(**given):
    return create_app(Engine(FakeModel(("primary",))), **given)


def client(host="localhost", made=None, **given) -> TestClient:
    return TestClient(made or app(**given), base_url=f"http://{host}")


def socket_status(server: TestClient, host: str, **headers) -> int:
    """Of a WebSocket: 101 if it opens."""
    try:
        with server.websocket_connect(f"ws://{host}/", headers=headers):
            return 101
    except WebSocketDenialResponse as refused:
        assert refused.json()["code"] in ("unauthorized", "forbidden", "busy")
        return refused.status_code


@pytest.mark.parametrize(
    "header, status",
    [
        (f"Bearer {KEY}", 200),
        (f"Api-Key {KEY}", 200),
        (f"api-key  {KEY} ", 200),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY}0", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        ("Bearer schlüssel".encode(), 401),
        (None, 401),
    ],
)
def test_a_key_is_asked_of_everyone(header, status):
    server, headers = client("robots.example", key=KEY), {} if header is None else {"Authorization": header}
    for path in PATHS:
        assert server.get(path, headers=headers).status_code == status
    assert server.post("/act", json={}, headers=headers).status_code == (400 if status == 200 else 401)
    assert socket_status(server, "robots.example", **headers) == (101 if status == 200 else 401)
    answer = server.get("/info", headers=headers)
    assert status == 200 or answer.headers["WWW-Authenticate"] == "Bearer" and KEY not in answer.text


def test_whether_a_server_lives_is_told_without_a_key():
    server = client("robots.example", key=KEY)
    assert server.get("/healthz").status_code == 200 and server.get("/readyz").status_code == 503
    assert server.post("/healthz").status_code == 401


@pytest.mark.parametrize("key", ["", " ", "schlüssel", "a\nb"])
def test_keys_that_are_none_are_refused(key):
    with pytest.raises(ValueError, match=VARIABLE):
        read_key({VARIABLE: key})
    with pytest.raises(ValueError, match=VARIABLE):  # or "Bearer " alone would open it
        app(key=key)


def test_a_key_is_read_from_the_environment():
    assert read_key({VARIABLE: f" {KEY}\n"}) == KEY
    assert read_key({}) is None
    assert client("robots.example", key=f" {KEY}\n").get("/info", headers={"Authorization": f"Bearer {KEY}"}).is_success


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "gpu-box", "GPU-Box:8000"]
)
def test_names_of_the_server_itself(host):
    server = client(names=["gpu-box"])
    assert server.get("/info", headers={"Host": host}).status_code == 200
    assert socket_status(server, "localhost", Host=host) == 101


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""])
def test_a_foreign_name_is_refused_without_a_key(host):
    """A site that lets its own name mean this machine: its pages are of the same origin then."""
    made = app()
    for method, path in (("GET", "/info"), ("GET", "/healthz"), ("POST", "/act"), ("GET", "/nothing")):
        answer = client(made=made).request(method, path, headers={"Host": host, "Origin": f"http://{host}"})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert socket_status(client(made=made), "localhost", Host=host, Origin=f"http://{host}") == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "https://evil.example:8000"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},  # another server of this machine
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
@pytest.mark.parametrize("key", [None, KEY])
def test_pages_of_other_sites_are_refused(headers, key):
    headers = {**headers, **({} if key is None else {"Authorization": f"Bearer {key}"})}
    server = client(key=key)
    for method, path in (("POST", "/act"), ("GET", "/info"), ("OPTIONS", "/act")):
        answer = server.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert socket_status(server, "localhost", **headers) == 403


def test_the_page_of_the_server_itself_may_ask():
    headers = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    server = client()
    assert server.post("/act", json={}, headers=headers).status_code == 400
    assert socket_status(server, "localhost", **headers) == 101
    link = client("robots.example", key=KEY, open_paths=["/"]).get("/", headers={"Sec-Fetch-Site": "cross-site"})
    assert link.status_code == 404  # it passes, and here is no page


def test_so_many_are_connected_at_a_time():
    with client(limits=Limits(connections=1)) as server, server.websocket_connect("ws://localhost/"):
        answer = server.get("/info")
        assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "busy", "1")
        assert socket_status(server, "localhost") == 503
        assert server.get("/healthz").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box", ""])
def test_other_addresses_need_a_key(host):
    with pytest.raises(ValueError, match=f"{VARIABLE}.*--insecure"):
        check_address(host, safe=False)
    check_address(host, safe=True)
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_none(host):
    check_address(host, safe=False)

"""Who may come in, what the server fetches, and what it tells nobody."""

from __future__ import annotations

import http.server
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from phisight.errors import ImageError, InputError

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from phisight.serve.remote import RemotePictures, is_public  # noqa: E402
from phisight.serve.settings import Access, Limits  # noqa: E402

KEY = "a-key-of-ours"
BODY = {"messages": [{"role": "user", "content": "How much is 2+2?"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve(
        api_keys=("another", KEY),
        allowed_hosts=("phi.example",),
        allowed_origins=("https://app.example",),
        image_hosts=("localhost", "127.0.0.1", "169.254.169.254"),
        body_seconds=0.4,
    )


def post(served: Any, **headers: str) -> Any:
    sent = {"Authorization": f"Bearer {KEY}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{served.url}/v1/chat/completions", json=BODY, headers=sent, timeout=60)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "a@localhost", "10.0.0.1", "[", ""]
)
def test_a_foreign_host_is_refused(served: Any, host: str) -> None:
    answer = post(served, Host=host)
    assert answer.status_code in (400, 403)  # 400 where the HTTP library refuses it
    assert httpx.get(f"{served.url}/health", headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1234", "127.0.0.1:99", "[::1]:8080", "phi.example", "Phi.Example."]
)
def test_its_own_names_are_accepted(served: Any, host: str) -> None:
    assert post(served, Host=host).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://app.example", "https://app.example.evil.example"]
)
def test_a_foreign_page_is_refused(served: Any, origin: str) -> None:
    answer = post(served, Origin=origin)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "foreign_origin"
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_is_allowed_may_read(served: Any) -> None:
    answer = post(served, Origin="https://app.example")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    url = f"{served.url}/v1/chat/completions"
    asked = httpx.options(url, headers={"Origin": "https://app.example", "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 204
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    assert httpx.options(url, headers={"Origin": "https://evil.example"}).status_code == 403
    assert post(served, Origin=served.url).status_code == 200  # its own page


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"])
def test_a_wrong_key_is_refused(served: Any, sent: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        answer = post(served, Authorization=sent.encode("latin-1"))
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "wrong" not in caplog.text
    for path in ("/metrics", "/v1/models", "/v1/models/demo", "/docs"):
        assert httpx.get(served.url + path).status_code == 401


def test_a_load_balancer_needs_no_key(served: Any) -> None:
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_any_key_will_do_where_none_is_asked_for(serve: Callable[..., Any]) -> None:
    assert post(serve(), Authorization="Bearer sk-whatever").status_code == 200


def test_nothing_of_a_request_is_logged(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post(served)
        httpx.get(f"{served.url}/v1/models/secret?text=secret", headers={"Authorization": f"Bearer {KEY}"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("phisight")]
    assert any("/v1/chat/completions 200" in line for line in lines)
    assert not any(text in line for line in lines for text in ("2+2", KEY, "secret"))


def test_a_slow_body_is_given_up(served: Any) -> None:
    with socket.create_connection((served.host, served.port), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert post(served).status_code == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "http://localhost/a.png", "http://169.254.169.254/latest"])
def test_no_picture_comes_from_this_network(served: Any, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    document = BODY | {"messages": [{"role": "user", "content": content}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=document, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert "no public address" in answer.json()["error"]["message"]


def test_addresses() -> None:
    private = "127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 "
    private += "::1 :: fe80::1 fe80::1%eth0 fd00::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: ff02::1"
    assert [address for address in private.split() if is_public(address)] == []
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34")))


class Site(http.server.BaseHTTPRequestHandler):
    """Pictures, redirects, too much and too slow."""

    def do_GET(self) -> None:
        targets = {"/loop": "/loop", "/away": "http://evil.example/", "/hop": "/a.png", "/file": "file:///etc/passwd"}
        if self.path in targets:
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        try:
            for _ in range({"/a.png": 1, "/endless": 10_000, "/slow": 100}.get(self.path, 0)):
                self.wfile.write(b"picture" * 100)
                time.sleep(0.1 if self.path == "/slow" else 0)
        except OSError:  # nobody reads on
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_picture_is_fetched_within_limits(site: int) -> None:
    limits = Limits(remote_bytes=10_000, remote_seconds=1.0)
    remote = RemotePictures((f"localhost:{site}",), limits, public=lambda _: True)
    assert remote.fetch(f"http://localhost:{site}/a.png") == b"picture" * 100
    assert remote.fetch(f"http://localhost:{site}/hop") == b"picture" * 100
    for path, said in {
        "loop": "redirects",
        "away": "not fetched from evil.example",
        "file": "must be http",
        "missing": "status 404",
        "endless": "larger than 10000",
        "slow": "too long",
    }.items():
        with pytest.raises(ImageError, match=said):
            remote.fetch(f"http://localhost:{site}/{path}")
    for url in (f"http://127.0.0.1:{site}/a.png", "http://localhost/a.png", f"http://x@localhost:{site}/a.png"):
        with pytest.raises(ImageError):
            remote.fetch(url)


def test_everybody_is_served_only_if_that_is_said() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "phi.example"):
        with pytest.raises(InputError, match="--api-key"):
            Access(host=host)
        assert Access(host=host, without_key=True)
        assert Access(host=host, api_keys=(KEY,))
    assert KEY not in repr(Access(api_keys=(KEY,)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_keys": ("",)},
        {"api_keys": ("a b",)},
        {"allowed_origins": ("app.example",)},
        {"image_hosts": ("http://x/",)},
    ],
)
def test_access_that_means_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Access(**wrong)

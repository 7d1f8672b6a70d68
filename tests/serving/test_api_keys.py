"""API keys: where they come from, what they open, and that nothing tells them."""

from __future__ import annotations

import hmac
import http.client
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_server import EngineBackend, RunningApi, running_api

from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.auth import ApiKeys
from deepseek_ray.serving.errors import HttpError

KEYS = ApiKeys.of(["first-key", "second-key"])


@pytest.fixture(scope="module")
def server() -> Iterator[RunningApi]:
    with running_api(EngineBackend, keys=KEYS) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_come_from_arguments_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nof-file\n\n  of-file-too  \n")
    keys = ApiKeys.of(["given"], file, {"DEEPSEEK_RAY_API_KEY": "of-environment", "HOME": "/root"})
    for key in ("given", "of-file", "of-file-too", "of-environment"):
        keys.check("/v1/models", f"Bearer {key}")
    for key in ("people", "# people", "/root", ""):
        with pytest.raises(HttpError):
            keys.check("/v1/models", f"Bearer {key}")
    assert not ApiKeys.of((), None, {})


@pytest.mark.parametrize("key", ["", "with space", "tab\t", "ключ", "new\nline"])
def test_a_key_no_client_could_send_is_refused_without_quoting_it(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        ApiKeys.of([key])
    assert not key or key not in caught.value.message


def test_a_file_that_cannot_be_read_or_is_empty_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.of((), tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        ApiKeys.of((), tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        ApiKeys.of((), tmp_path / "binary")


def test_every_key_is_compared_whole_and_as_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watch(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    KEYS.check("/v1/models", "Bearer first-key")
    with pytest.raises(HttpError):
        KEYS.check("/v1/models", "Bearer x")
    assert len(compared) == 4
    assert {len(value) for pair in compared for value in pair} == {32}


def test_nothing_holds_a_key_in_clear() -> None:
    assert "first-key" not in repr(KEYS)
    assert all(b"key" not in digest for digest in KEYS.digests)


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1/..;/health", "http://health/health/",
        "/v1", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/v1/completions", "/nothing", "/health/",
        "//health", "/v1/../health", "/health/../v1/models", "/%68ealth/x", "/health%2f..%2fv1/models", "/READY",
    ],
)  # fmt: skip
def test_every_path_but_health_and_ready_needs_a_key(server: RunningApi, path: str) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))  # sends paths as they are
    for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "TRACE"):
        connection.request(method, path, headers={"Host": "localhost/health?"})
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 401, method
        assert reply.headers["www-authenticate"] == "Bearer"
    connection.close()


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "first-key", "Basic first-key", "Bearer first-ke", "Bearer first-key2", "Bearer \xe9"],
)
def test_a_wrong_header_is_answered_as_openai_does(server: RunningApi, authorization: str) -> None:
    headers = {"Authorization": authorization.encode("latin-1")}
    reply = httpx.get(server.url + "/v1/models", headers=headers)
    assert reply.status_code == 401
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_api_key"
    assert not re.search("first|second", error["message"])


@pytest.mark.parametrize("headers", [bearer("first-key"), {"Authorization": "bearer  second-key"}], ids=str)
def test_each_key_opens_the_api(server: RunningApi, headers: dict[str, str]) -> None:
    assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_and_ready_stay_open(server: RunningApi, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 200


def test_keys_are_not_logged(server: RunningApi, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        httpx.post(server.url + "/v1/completions", headers=bearer("first-key"), content=b"{")
        httpx.get(server.url + "/v1/models", headers=bearer("not-a-key-of-ours"))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("deepseek_ray", "uvicorn"))]
    assert not [text for text in ours if "first-key" in text or "not-a-key" in text]

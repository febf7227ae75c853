"""The options that a gateway hands on to its server, and those that would have no effect."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from background_program import Program
from eventually import until
from helpers.__main__ import _parser, main
from helpers.gateway.options import GatewayArgs
from scripted_service import ScriptedService
from test_gateway_process import CHAT, start_gateway, url_of

PASSWORD = "the password of the key"


@pytest.mark.parametrize(
    "words",
    [
        ["--keys=keys"],
        ["--cors=https://a.org", "--cors=https://b.org"],
        ["--allowed-host=a.org"],
        ["--root-path=/llm", "--limit-concurrency=9"],
        ["--timeout-graceful-shutdown=0"],
        ["--log-level=error"],
    ],
    ids=str,
)
def test_an_option_of_the_gateway_is_handed_on_or_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = GatewayArgs.from_namespace(_parser().parse_args(["serve", "--http=8000", *words]))
    again = GatewayArgs.from_namespace(_parser().parse_args(["gateway", *args.to_arguments()]))
    assert again == args != GatewayArgs()
    assert args.to_arguments() == words
    assert main(["serve", *words]) == 1
    error = capsys.readouterr().err
    assert "Without --http no gateway runs" in error
    assert all(word.partition("=")[0] in error for word in words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ssl-ca-certs=x"], "needs TLS"),
        (["--root-path=llm"], "Write it like /llm"),
        (["--root-path=/llm/"], "Write it like /llm"),
        (["--limit-concurrency=0"], "Choose at least 1"),
        (["--timeout-graceful-shutdown=-1"], "Choose at least 0 seconds"),
        (["--allowed-host=http://a.org"], "is not a host"),
    ],
)
def test_a_wrong_option_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", *words]) == 1
    assert says in capsys.readouterr().err


def test_the_options_reach_the_server(script: Callable[..., Program], scripted: ScriptedService) -> None:
    words = ("--root-path=/llm", "--limit-concurrency=2", "--log-level=warning", "--allowed-host=a.org")
    program = start_gateway(script, scripted, *words)
    url = url_of(program)
    with httpx.Client(timeout=60) as client, httpx.Client(timeout=60) as other:
        assert client.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert client.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
        assert client.get(f"{url}/health", headers={"host": "a.org"}).status_code == 200
        assert client.get(f"{url}/health", headers={"host": "b.org"}).status_code == 403
        assert other.get(f"{url}/health").status_code == 503
    until(lambda: httpx.get(f"{url}/health", timeout=60).status_code == 200, "the first connection is closed")
    assert "POST /v1" not in program.log.read_text()


def test_a_client_needs_a_certificate_if_the_gateway_demands_one(
    script: Callable[..., Program], scripted: ScriptedService, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes certificates, is not installed. Install it for this test.")
    key, certificate, plain_key = (str(tmp_path / name) for name in ("key", "certificate", "plain-key"))
    environment = {**os.environ, "HELPERS_SSL_KEYFILE_PASSWORD": PASSWORD}
    make = ["req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    for command in ([*make, "-passout", "env:P"], ["rsa", "-in", key, "-passin", "env:P", "-out", plain_key]):
        subprocess.run(["openssl", *command], check=True, capture_output=True, env={**os.environ, "P": PASSWORD})
    files: tuple[Any, ...] = ("--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certs", certificate)
    program = start_gateway(script, scripted, *files, env=environment)
    url = url_of(program)
    assert url.startswith("https://")
    trusting = ssl.create_default_context(cafile=certificate)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/health", verify=trusting)
    trusting.load_cert_chain(certificate, plain_key)
    assert httpx.get(f"{url}/health", verify=trusting).json() == {"status": "ok"}
    without = start_gateway(script, scripted, *files, start_new_session=True)
    assert without.process.wait(60) == 1
    assert "set HELPERS_SSL_KEYFILE_PASSWORD if the key has a password" in without.log.read_text()
    assert PASSWORD not in json.dumps([one.log.read_text() for one in (program, without)])

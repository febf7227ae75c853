"""`helpers.hub`: tokens and licences, asked by the Hub's real client of a stub of its API."""

from __future__ import annotations

import os
import re
import secrets
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers import hub as hub_module
from helpers.catalog import LLAMA2
from helpers.hub import HubAccess, Licence, Token, find_token, hub_access
from hub_stub import MALFORMED, NO_HUB, TOKEN, HubStub, Repo, model_folder

NARROW = f"hf_{secrets.token_hex(17)}"
TOKENS = {"alice": TOKEN, "narrow": NARROW, "unknown": TOKEN[:-1]}
ALICE = Token("a test", TOKEN)


@pytest.fixture(autouse=True)
def _no_output_contains_the_token(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    yield
    assert TOKEN not in "".join([*capfd.readouterr(), caplog.text])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A stub with a repository in each state, for this process. It checks that no address contains a token."""
    states = ("public", "granted", "pending", "never asked", "reset", "rejected", "missing")
    repos = {f"org/{s.replace(' ', '-')}": Repo(s, parameters={"BF16": 300, "F32": 4}) for s in states}
    with HubStub({TOKEN: "alice", NARROW: "bob"}, repos, {NARROW}) as stub:
        stub.connect(monkeypatch, home=tmp_path / "home")
        monkeypatch.setattr(hub_module, "HUB_SECONDS", 60.0)
        yield stub
        assert not [request for request in stub.requests if "hf_" in request.path]


# --- The licence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["org/public", "org/granted"])
def test_a_granted_model_has_a_user_its_parameters_and_nothing_to_fix(hub: HubStub, repo_id: str) -> None:
    access = hub_access(ALICE, repo_id)
    assert access == HubAccess(repo_id, Licence.GRANTED, user="alice", parameters=304)
    assert access.finding == f"alice may download {repo_id}"
    assert access.fix == ""


@pytest.mark.parametrize(
    ("token", "repo_id", "licence", "user"),
    [
        ("alice", "org/pending", Licence.REQUESTED, "alice"),
        ("alice", "org/never-asked", Licence.NEVER_ASKED, "alice"),
        ("alice", "org/reset", Licence.NEVER_ASKED, "alice"),
        ("alice", "org/rejected", Licence.REFUSED, "alice"),
        ("alice", "org/missing", Licence.MISSING, "alice"),
        ("alice", LLAMA2, Licence.MISSING, "alice"),
        ("alice", "no such name!", Licence.MISSING, None),
        ("unknown", "org/granted", Licence.TOKEN_REFUSED, None),
        ("unknown", "org/public", Licence.TOKEN_REFUSED, None),
        ("narrow", "org/granted", Licence.TOKEN_TOO_NARROW, "bob"),
        (None, "org/granted", Licence.NO_TOKEN, None),
        (None, "org/missing", Licence.MISSING, None),
        (None, LLAMA2, Licence.MISSING, None),
    ],
)
def test_each_licence_is_told_apart_and_has_a_fix(
    hub: HubStub, token: str | None, repo_id: str, licence: Licence, user: str | None
) -> None:
    access = hub_access(token and Token("a test", TOKENS[token]), repo_id)
    assert (access.licence, access.user, access.parameters) == (licence, user, None)
    assert access.fix.endswith(".") and "{" not in access.finding + access.fix
    about_the_token = licence in (Licence.NO_TOKEN, Licence.TOKEN_REFUSED, Licence.TOKEN_TOO_NARROW)
    assert about_the_token or repo_id in access.finding


@pytest.mark.parametrize(("token", "user"), [("narrow", "bob"), (None, None)])
def test_a_public_model_needs_no_permission(hub: HubStub, token: str | None, user: str | None) -> None:
    access = hub_access(token and Token("a test", TOKENS[token]), "org/public")
    assert (access.licence, access.user, access.parameters) == (Licence.GRANTED, user, 304)


@pytest.mark.parametrize(
    ("path", "fault", "detail"),
    [
        ("", "drop", "RemoteProtocolError"),
        ("", "html", "JSONDecodeError"),
        ("", 503, "HTTP status 503"),
        ("auth-check", "drop", "RemoteProtocolError"),
        ("auth-check", 503, "HTTP status 503"),
        ("org/granted", "html", "JSONDecodeError"),
    ],
)
def test_a_hub_that_fails_is_unreachable(hub: HubStub, path: str, fault: str | int, detail: str) -> None:
    with hub.failing(path, fault):
        access = hub_access(ALICE, "org/granted")
    assert access.licence is Licence.UNREACHABLE
    assert access.finding == f"the Hub gave no usable answer about org/granted ({detail})"


def test_a_hub_that_never_answers_is_unreachable(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "HUB_SECONDS", 0.2)
    with hub.failing("", "hang"):
        access = hub_access(ALICE, "org/granted")
    assert access.licence is Licence.UNREACHABLE
    assert "no answer within" in access.finding


def test_a_hub_that_does_not_run_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NO_HUB.connect(monkeypatch, home=tmp_path)
    assert hub_access(ALICE, "org/granted").licence is Licence.UNREACHABLE


def test_offline_the_hub_is_not_asked(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    access = hub_access(ALICE, "org/granted")
    assert access.licence is Licence.OFFLINE and "HF_HUB_OFFLINE is set" in access.finding
    assert hub.requests == []


def test_without_a_token_hugging_face_is_not_asked_about_llama_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(hub_module, "_ask_hub", lambda *_: pytest.fail("the Hub was asked"))
    assert hub_access(None, LLAMA2).licence is Licence.NO_TOKEN


# --- A mirror at HF_ENDPOINT ----------------------------------------------------------------------


@pytest.fixture
def mirror(hub: HubStub, tmp_path: Path) -> HubStub:
    """A mirror that has files, and no endpoint that tells the licence, the account or the size."""
    for name, repo in hub.repos.items():
        hub.repos[name] = replace(repo, folder=model_folder(tmp_path / name))
    hub.repos[LLAMA2] = Repo(folder=model_folder(tmp_path / LLAMA2))
    hub.faults = {"/api/": 404}
    return hub


@pytest.mark.parametrize("status", [400, 403, 404, 405, 429, 501, 503])
def test_a_mirror_without_the_licence_endpoint_grants_what_it_has(mirror: HubStub, status: int) -> None:
    mirror.faults = {"/api/": status}
    assert hub_access(ALICE, "org/granted") == HubAccess("org/granted", Licence.GRANTED)
    assert hub_access(None, "org/public") == HubAccess("org/public", Licence.GRANTED)
    assert {request.token for request in mirror.requests if "public" in request.path} == {None}


def test_a_mirror_may_give_llama_2_without_a_token(mirror: HubStub) -> None:
    assert hub_access(None, LLAMA2).licence is Licence.GRANTED


@pytest.mark.parametrize(
    ("token", "repo_id", "licence"),
    [
        ("alice", "org/pending", Licence.REQUESTED),
        ("alice", "org/never-asked", Licence.NEVER_ASKED),
        ("narrow", "org/granted", Licence.TOKEN_TOO_NARROW),
        ("unknown", "org/granted", Licence.TOKEN_REFUSED),
        ("alice", "org/missing", Licence.UNREACHABLE),
        (None, "org/granted", Licence.NO_TOKEN),
    ],
)
def test_a_mirror_that_refuses_a_file_is_believed(
    mirror: HubStub, token: str | None, repo_id: str, licence: Licence
) -> None:
    assert hub_access(token and Token("a test", TOKENS[token]), repo_id).licence is licence


def test_a_page_for_people_is_not_a_file_of_a_mirror(mirror: HubStub) -> None:
    mirror.faults = {"/api/": 404, "/resolve/": "html"}
    assert hub_access(ALICE, "org/granted").licence is Licence.UNREACHABLE


@pytest.mark.parametrize(("repo_id", "licence"), [("org/granted", Licence.GRANTED), ("org/pending", Licence.REQUESTED)])
def test_the_licence_is_known_if_the_account_is_asked_for_too_often(
    hub: HubStub, repo_id: str, licence: Licence
) -> None:
    with hub.failing("whoami", 429):
        access = hub_access(ALICE, repo_id)
    assert (access.licence, access.user) == (licence, None)
    assert "this account" in access.finding


def test_only_the_given_token_is_sent(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", NARROW)
    hub_access(ALICE, "org/granted")
    assert {request.token for request in hub.requests} == {TOKEN}
    hub.requests.clear()
    hub_access(None, "org/public")
    assert {request.token for request in hub.requests} == {None}


def test_a_refused_token_is_not_sent_again_to_learn_its_account(hub: HubStub) -> None:
    """`HfApi.whoami` would look for another token, also in Colab."""
    hub_access(Token("a test", TOKENS["unknown"]), "org/granted")
    assert [request.path for request in hub.requests] == ["/api/models/org/granted/auth-check"]


# --- Secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("show", [repr, str, format, lambda token: repr(HubAccess("org/m", Licence.NO_TOKEN, token))])
def test_a_token_does_not_show_its_value(show: Callable[[Token], str]) -> None:
    assert "Token(source='a test')" in show(ALICE)
    assert TOKEN not in show(ALICE)


@pytest.mark.parametrize(("form", "problem"), MALFORMED.items())
def test_a_malformed_token_is_not_sent_and_its_problem_is_named(hub: HubStub, form: str, problem: str) -> None:
    access = hub_access(Token("a test", form.format(TOKEN)), "org/granted")
    assert access.licence is Licence.TOKEN_MALFORMED
    assert re.search(rf"cannot be sent \(it {problem}\)$", access.finding)
    assert access.fix.startswith("Store it again without spaces and quotation marks")
    assert TOKEN not in access.finding
    assert hub.requests == []


@pytest.mark.parametrize("value", ["hf_a1", "api_b2", "eyJhbGciOi.eyJpc3Mi.c2ln-bmF0_dXJl", "YWJj+/ZGVm=="])
def test_every_token_that_a_header_may_carry_is_sent(hub: HubStub, value: str) -> None:
    assert Token("a test", value).usable
    access = hub_access(Token("a test", value), "org/granted")
    assert access.licence is Licence.TOKEN_REFUSED
    assert ("it does not begin with hf_" in access.finding) is not value.startswith("hf_")
    assert hub.requests


def test_what_the_http_client_says_is_not_quoted(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client quotes a header that it does not send. `Token.usable` would refuse such a token earlier."""
    monkeypatch.setattr(Token, "usable", True)
    access = hub_access(Token("a test", f"{TOKEN}\nx"), "org/granted")
    assert access.finding == "the Hub gave no usable answer about org/granted (LocalProtocolError)"
    assert all(request.token is None for request in hub.requests)


# --- The token ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token."""
    NO_HUB.connect(monkeypatch, home=tmp_path)
    return tmp_path


def test_the_environment_comes_before_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    (home / "token").write_text(f"{TOKEN}1\n")
    assert find_token() == Token(f"file {home / 'token'}", f"{TOKEN}1")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", f" {TOKEN}2\n")
    assert find_token() == Token("environment variable HUGGING_FACE_HUB_TOKEN", f"{TOKEN}2")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_token() == Token("environment variable HF_TOKEN", TOKEN)


def test_a_token_that_a_console_wrapped_is_joined(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN[:9]}\r\n{TOKEN[9:]}\n")
    token = find_token()
    assert token == Token("environment variable HF_TOKEN", TOKEN)
    assert token.usable


def test_a_file_that_is_not_text_has_no_usable_token(home: Path) -> None:
    (home / "token").write_bytes(f"{TOKEN}\n".encode("utf-16"))  # as PowerShell's > writes it
    token = find_token()
    assert token and token.source == f"file {home / 'token'}" and not token.usable


def test_a_ci_jobs_token_comes_before_all_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_OIDC_RESOURCE", "org/model")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: f"{TOKEN}3")
    assert find_token() == Token("the exchange for HF_OIDC_RESOURCE", f"{TOKEN}3")


def test_an_exchange_that_fails_finds_no_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_OIDC_RESOURCE", "org/model")
    with pytest.raises(huggingface_hub.errors.OIDCError):
        huggingface_hub.get_token()
    assert find_token() is None


@pytest.fixture
def colab_secrets(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The secrets of a Colab notebook that this process plays: name → value, or the error that reading it raises."""
    secrets: dict[str, object] = {}

    def get(name: str) -> object:
        secret = secrets.get(name, LookupError(name))
        if isinstance(secret, Exception):
            raise secret
        return secret

    colab, userdata = types.ModuleType("google.colab"), types.ModuleType("google.colab.userdata")
    userdata.get = get  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)
    monkeypatch.delenv("VERTEX_PRODUCT", raising=False)
    return secrets


def test_a_colab_secret_is_found(colab_secrets: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    colab_secrets["HF_TOKEN"] = f"{TOKEN}\n"
    assert find_token() == Token("Colab secret HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_TOKEN", NARROW)
    assert find_token() == Token("environment variable HF_TOKEN", NARROW)


def test_a_colab_secret_that_is_added_later_is_found(colab_secrets: dict[str, object]) -> None:
    for failure in (LookupError("no secret"), PermissionError("no access"), TimeoutError("no browser")):
        colab_secrets["HF_TOKEN"] = failure
        assert find_token() is None
    colab_secrets["HF_TOKEN"] = TOKEN
    assert find_token() == Token("Colab secret HF_TOKEN", TOKEN)


def test_outside_a_colab_notebook_its_secrets_are_not_read(
    colab_secrets: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    colab_secrets["HF_TOKEN"] = TOKEN
    monkeypatch.setitem(os.environ, "VERTEX_PRODUCT", "COLAB_ENTERPRISE")
    assert find_token() is None
    monkeypatch.delenv("VERTEX_PRODUCT")
    monkeypatch.delitem(sys.modules, "google.colab")
    assert find_token() is None

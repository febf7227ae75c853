"""Ask the Hugging Face Hub what this user may download: the token, its account, and the licence of a model.

A token's value leaves this module only in `Token.value`. Errors of the Hub's client are rephrased and never
quoted, because their messages can contain the header that carries the token.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import re
import sys
import threading
from dataclasses import dataclass, field

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from .catalog import KNOWN_PARAMETERS, LLAMA2, OR_BUNDLED

HUB_SECONDS = 8.0
"""The longest wait for the Hub, including name resolution, which has no timeout in the HTTP client."""

HUGGING_FACE = "https://huggingface.co"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
STORE_AGAIN = f"Store it again without spaces and quotation marks, or replace it with a new one from {TOKENS_PAGE}"
GET_TOKEN = (
    f"Create an access token of type Read at {TOKENS_PAGE} and run `hf auth login`, or set HF_TOKEN; "
    "in Colab, add it as HF_TOKEN in the key panel and grant this notebook access."
)


_QUOTATION_MARKS = "\"'`\u2018\u2019\u201c\u201d"


@dataclass(frozen=True)
class Token:
    """An access token for Hugging Face. `source` is a noun phrase for the place where it was found.

    `repr` and `str` do not show the value. The value is "" if the file that should hold it is not text.
    """

    source: str
    value: str = field(repr=False)

    @property
    def usable(self) -> bool:
        """Return whether the token has no `problem`. The Hub's client may quote any other token in an error."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Return what is wrong with the token's characters, as a clause without a subject, or "".

        RFC 6750 lists the characters that a token may have. Docker's ``--env-file`` keeps quotation marks.
        """
        if re.fullmatch(r"[\w.~+/-]+=*", self.value, re.ASCII):
            return ""
        if not self.value:
            return "is not text"
        if self.value[0] in _QUOTATION_MARKS and self.value[-1] in _QUOTATION_MARKS:
            return "is in quotation marks"
        wrong = sorted(set(re.findall(r"[^\w.~+/-]", self.value, re.ASCII)) or {"="})[:3]
        names = ("a space" if c == " " else c if "!" <= c <= "~" else f"U+{ord(c):04X}" for c in wrong)
        return f"contains characters that no token has: {', '.join(names)}"


def find_token() -> Token | None:
    """Return the token that huggingface_hub would use, or None. Never raises.

    The order is huggingface_hub's own (1.27 and 2.4, ``utils/_auth.py``): if HF_OIDC_RESOURCE is set, a token that
    the Hub gives a CI job for its identity; the environment; the file that ``hf auth login`` writes
    (``HF_TOKEN_PATH``, ``HF_HOME``); the secret HF_TOKEN of a Colab notebook. If ``huggingface_hub.get_token()``
    raises (the Hub refuses the exchange, or the file cannot be read), the result is None too.
    """
    source = _token_source()
    try:
        value = huggingface_hub.get_token() if source else _colab_secret()
    except UnicodeDecodeError:
        value = ""
    except Exception:  # Colab, the exchange and the file each raise their own classes
        return None
    return None if value is None else Token(source or "Colab secret HF_TOKEN", value)


def _token_source() -> str | None:
    """Return the first place where huggingface_hub finds a token, or None if only Colab is left."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return "the exchange for HF_OIDC_RESOURCE"
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    if os.environ.get(name, "").strip():
        return f"environment variable {name}"
    file = constants.HF_TOKEN_PATH
    return f"file {file}" if os.path.isfile(file) and os.path.getsize(file) else None


def _colab_secret() -> str | None:
    """Return the secret of Colab's key panel, which only the notebook's own process can read.

    Raise Colab's own errors if there is no secret, if this notebook may not read it, or if no browser answers.
    Does not call ``get_token``, which remembers a missing secret until the kernel restarts.
    """
    if "google.colab" not in sys.modules or os.environ.get("VERTEX_PRODUCT") == "COLAB_ENTERPRISE":
        return None
    secret = importlib.import_module("google.colab.userdata").get("HF_TOKEN") or ""
    return secret.replace("\r", "").replace("\n", "").strip() or None


class Licence(enum.Enum):
    """The answer to whether a token may download a repository, or the reason why there is no answer.

    `finding` is a clause about ``{user}`` and ``{repo}``; `fix` is a sentence, or "" if there is nothing to fix.
    """

    GRANTED = ("{user} may download {repo}", "")
    REQUESTED = (
        "{user} asked for access to {repo}, and its authors have not answered yet",
        "Wait for their answer: https://huggingface.co/settings/gated-repos lists your requests.",
    )
    NEVER_ASKED = (
        "the weights of {repo} are gated, and {user} has not asked for access",
        "Open https://huggingface.co/{repo} with this account, accept the licence and send the form.",
    )
    REFUSED = (
        "the authors of {repo} did not give {user} access",
        "Read what https://huggingface.co/{repo} says about your request.",
    )
    NO_TOKEN = ("no access token for Hugging Face was found", GET_TOKEN)
    TOKEN_MALFORMED = ("the access token for Hugging Face that was found cannot be sent", f"{STORE_AGAIN}.")
    TOKEN_REFUSED = (
        "Hugging Face does not accept this token",
        f"Check that it is complete and has not expired, or replace it with a new one from {TOKENS_PAGE}.",
    )
    TOKEN_TOO_NARROW = (
        "this fine-grained token may not read gated models",
        f"Let it read public gated repositories at {TOKENS_PAGE}, or create a token of type Read there.",
    )
    MISSING = ("the Hub has no model {repo}, or it is private", f"Check the spelling, {OR_BUNDLED}")
    OFFLINE = (
        "the Hub was not asked about {repo}, because HF_HUB_OFFLINE is set",
        f"Unset HF_HUB_OFFLINE, {OR_BUNDLED}",
    )
    UNREACHABLE = ("the Hub gave no usable answer about {repo}", f"Check the network, {OR_BUNDLED}")

    def __init__(self, finding: str, fix: str) -> None:
        self.finding = finding
        self.fix = fix


@dataclass(frozen=True)
class HubAccess:
    """The Hub's answer about one repository and one token.

    - ``licence``: `Licence.GRANTED` also for a repository that is open to everyone.
    - ``user``: the token's account, if the Hub named it.
    - ``parameters``: the number that the model has; known only if the licence is granted, and not for every repository.
    - ``detail``: a clause with more about the finding, or "".
    """

    repo_id: str
    licence: Licence
    user: str | None = None
    parameters: int | None = None
    detail: str = ""

    @property
    def finding(self) -> str:
        """Return the finding as a clause, without a full stop."""
        text = self.licence.finding.format(user=self.user or "this account", repo=self.repo_id)
        return f"{text} ({self.detail})" if self.detail else text

    @property
    def fix(self) -> str:
        """Return what to do now, as a sentence, or "" if there is nothing to fix."""
        return self.licence.fix.format(repo=self.repo_id)


def hub_access(token: Token | None, repo_id: str = LLAMA2) -> HubAccess:
    """Ask the Hub at ``HF_ENDPOINT`` who owns `token` and whether it may download `repo_id`. Never raises.

    This takes at most `HUB_SECONDS`. It sends no request if ``HF_HUB_OFFLINE`` is set, if the token is not
    `Token.usable`, or if there is no token and the model is Llama 2, which is gated on huggingface.co.
    """
    if token is None and repo_id == LLAMA2 and constants.ENDPOINT == HUGGING_FACE:
        return HubAccess(repo_id, Licence.NO_TOKEN)
    if token and not token.usable:
        return HubAccess(repo_id, Licence.TOKEN_MALFORMED, detail=f"it {token.problem}")
    answer: list[HubAccess] = []
    asking = threading.Thread(target=lambda: answer.append(_ask_hub(token, repo_id)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    late = f"no answer within {HUB_SECONDS:.0f} seconds"
    return answer[0] if answer else HubAccess(repo_id, Licence.UNREACHABLE, detail=late)


def _ask_hub(token: Token | None, repo_id: str) -> HubAccess:
    """Ask for the licence first: if the token is not accepted, `HfApi.whoami` looks for others, in Colab too."""
    api = huggingface_hub.HfApi(token=token.value if token else False)
    user = parameters = None
    try:
        licence, detail = _ask_licence(api, token, repo_id)
        if token and licence not in (Licence.TOKEN_REFUSED, Licence.UNREACHABLE):
            with contextlib.suppress(hub_errors.HfHubHTTPError):  # too many requests, or a mirror
                user = str(api.whoami()["name"])
        if licence is Licence.GRANTED:
            parameters = KNOWN_PARAMETERS.get(repo_id) or _parameters_on_hub(api, repo_id)
    except Exception as error:  # the HTTP client's classes, or a login page that is not JSON
        licence, detail = _licence_from(error, token)
    return HubAccess(repo_id, licence, user, parameters, detail)


def _ask_licence(api: huggingface_hub.HfApi, token: Token | None, repo_id: str) -> tuple[Licence, str]:
    """Return the licence and a detail. Raise every error that carries no answer of the Hub.

    A mirror at ``HF_ENDPOINT`` may lack the licence endpoint. If the answer is not clear, ask for a file too; the reply
    must have the headers that a download needs.
    """
    huggingface_hub.utils.validate_repo_id(repo_id)
    try:
        api.auth_check(repo_id)
        return Licence.GRANTED, ""
    except hub_errors.HfHubHTTPError as error:
        answer = _licence_from(error, token)
    if answer[0] not in _UNCLEAR:
        return answer
    try:
        url = huggingface_hub.hf_hub_url(repo_id, "config.json")
        file = huggingface_hub.get_hf_file_metadata(url, token=token.value if token else False)
        return (Licence.GRANTED, "") if file.commit_hash and file.etag else answer
    except hub_errors.HfHubHTTPError as error:
        second = _licence_from(error, token)
        return answer if second[0] in _UNCLEAR else second


_UNCLEAR = (Licence.UNREACHABLE, Licence.MISSING)


def _parameters_on_hub(api: huggingface_hub.HfApi, repo_id: str) -> int | None:
    """Return the number of parameters that the Hub counts, or None if it has not counted them."""
    try:
        info = api.model_info(repo_id, expand=["safetensors"])
    except hub_errors.HfHubHTTPError:
        return None  # a mirror
    return info.safetensors.total if info.safetensors else None


def _licence_from(error: Exception, token: Token | None) -> tuple[Licence, str]:
    """Return the licence, and a detail, that an error of the Hub's client stands for.

    The Hub answers 403 with ``X-Error-Code: GatedRepo`` for a gated repository (401 without a token). Only the
    sentence in ``X-Error-Message`` says more: "... is awaiting a review from the repo authors.", "... you are not
    in the authorized list. Visit ... to ask for access.", "... has been reset by the repo's authors. Visit ... to
    submit a new request.", "... has been rejected by the repo's authors.". A fine-grained token without the
    permission gets a 403 without a code: "Please enable access to public gated repositories in your fine-grained
    token settings ...". A missing repository is 404 with ``RepoNotFound``, or a plain 401 without a token.
    """
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return Licence.OFFLINE, ""
    if isinstance(error, hub_errors.HFValidationError):
        return Licence.MISSING, "no model can have this name"
    if not isinstance(error, hub_errors.HfHubHTTPError):
        return Licence.UNREACHABLE, type(error).__name__
    status = error.response.status_code
    message = error.response.headers.get("X-Error-Message") or str(error)
    if isinstance(error, hub_errors.GatedRepoError):  # a subclass of RepositoryNotFoundError, so it comes first
        if token is None:
            return Licence.NO_TOKEN, ""
        if "awaiting a review" in message:
            return Licence.REQUESTED, ""
        may_ask = "to ask for access" in message or "submit a new request" in message
        return (Licence.NEVER_ASKED if may_ask else Licence.REFUSED), ""
    if status == 401 and token:
        return Licence.TOKEN_REFUSED, "" if token.value.startswith("hf_") else "it does not begin with hf_"
    if status == 401:
        return Licence.MISSING, ""
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return Licence.MISSING, ""
    if status == 403 and "fine-grained" in message:
        return Licence.TOKEN_TOO_NARROW, ""
    return Licence.UNREACHABLE, f"HTTP status {status}"

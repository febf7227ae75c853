"""Servers with OpenAI's API behind a gateway: vLLM, SGLang, llama.cpp, ``transformers serve``, or another gateway.

They stand in for the services of `helpers.gateway.services`: requests and answers have the same fields. OpenAI's
package sends the requests. It is imported when it is needed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..addresses import bracketed, is_loopback
from ..errors import GenerationFailed, HelpersError, InvalidRequest, QueueFull, ServiceUnavailable
from ..fields import ChatFields, OutputFields, PromptFields
from ..options import MAX_TOKENS
from .errors import WrongSetup
from .openai_answers import OpenAICall
from .services import SECONDS_TO_ANSWER, first_replies, too_slow

KEY_VARIABLE = "HELPERS_SERVICE_API_KEY"
"""The environment variable with the key for the servers: every user of the machine can see an argument."""
_STATUSES = {"invalid_request_error": 400, "rate_limit_error": 429}
"""OpenAI's type of an error in a stream → the status that it has before a stream begins."""


@dataclass(frozen=True)
class ServerModel:
    """The model of a server with OpenAI's API: its id, and its context window in tokens, if the server tells it."""

    model: str
    context_length: int | None
    precision: None = None


class OpenAIServices:
    """One server with OpenAI's API, or several that run the same model and take turns. Nothing is sent before a call.

    `urls` are like ``http://127.0.0.1:8000/v1``. `model` is the id of the model, for servers that list several. The key
    for the servers comes from the environment variable `KEY_VARIABLE`.

    Raise `InvalidRequest` for a URL that is not one or that contains a key, and if OpenAI's package is not installed.
    """

    def __init__(self, urls: Sequence[str], model: str | None = None) -> None:
        self._servers = [Server(_checked(url), model) for url in urls]
        self._turns = itertools.count()
        self.count = len(urls)

    def call(self, _endpoint: str, request: ChatFields | PromptFields, _reply_type: type[OutputFields]) -> OpenAICall:
        """Return a request to the next server of those that answered when they were last asked."""
        servers = [server for server in self._servers if server.answers] or self._servers
        return OpenAICall(servers[next(self._turns) % len(servers)], request)

    async def describe(self, *, patient: bool = False) -> dict[str, ServerModel | ServiceUnavailable]:
        """Ask all servers at once for their model. Return each reply, or why there is none, by URL.

        Wait as `helpers.gateway.services.Services.describe` does.
        """
        return await first_replies({server.url: server.describe() for server in self._servers}, patient=patient)

    async def close(self) -> None:
        """Close the connections. The next call opens them again."""
        for server in self._servers:
            await server.close()


class Server:
    """A server at `url`. `answers` is whether it answered when it was last asked."""

    def __init__(self, url: str, model: str | None) -> None:
        try:
            import openai
        except ImportError:
            raise InvalidRequest(
                f"A gateway in front of {url} needs the package openai. Install it: pip install openai"
            ) from None
        self.url, self.answers = url, True
        self._chosen = self._model = model
        host = str(urlsplit(url).hostname)
        # no proxy reaches this machine
        mounts: dict[str, Any] = {f"all://{bracketed(host)}": None} if is_loopback(host) else {}
        self._new_client = lambda: openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get(KEY_VARIABLE, "").strip() or "none",  # None would send that of OPENAI_API_KEY
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(mounts=mounts),
        )
        self._client = self._new_client()

    async def describe(self) -> ServerModel | ServiceUnavailable:
        """Ask which model the server runs. Return why it does not tell, instead of raising it."""
        self.answers = False
        try:
            models = (await asyncio.wait_for(self._client.models.list(), SECONDS_TO_ANSWER)).data
            lengths = {model.id: _context_length(model) for model in models}
        except asyncio.TimeoutError:
            return too_slow(self.url)
        except Exception as error:
            # `transformers serve` lists the Hub's cache, and fails if there is none; the model may still be a folder
            if not (self._chosen and getattr(error, "status_code", None) == 500):
                failure = self.failure(error)
                return failure if isinstance(failure, ServiceUnavailable) else ServiceUnavailable(str(failure))
            lengths = {}
        self.answers = True
        if self._chosen is None and len(lengths) != 1:
            return WrongSetup(
                f"The service lists {len(lengths)} models. Name the one to use with the gateway's --service-model."
            )
        self._model = self._chosen or next(iter(lengths))
        return ServerModel(self._model, lengths.get(self._model))

    async def send(self, request: ChatFields | PromptFields) -> Any:
        """Send `request`, and return the stream of its answer, which must be closed. Raise what `failure` takes."""
        if self._model is None:
            raise ServiceUnavailable(f"The server at {self.url} has not named its model yet. Ask again.")
        options: dict[str, Any] = {"max_tokens": request.max_tokens, "seed": request.seed, "stop": request.stop}
        if request.max_tokens == MAX_TOKENS:  # the server's default
            del options["max_tokens"]
        sampling = {"temperature": request.temperature, "top_p": request.top_p}
        if isinstance(request, PromptFields):
            create: Any = self._client.completions.create
            options |= {"prompt": request.prompt, "logprobs": request.logprobs}
        else:
            create = self._client.chat.completions.create
            # without a number for 0: llama.cpp would then report nothing
            logprobs = None if request.logprobs is None else True
            options |= {"messages": request.messages, "logprobs": logprobs, "top_logprobs": request.logprobs or None}
        given = {name: value for name, value in options.items() if value not in (None, [])}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return await create(model=self._model, **given, **sampling, **stream)

    async def close(self) -> None:
        """Close the connections to the server."""
        client, self._client = self._client, self._new_client()
        await client.close()

    def failure(self, error: Exception) -> HelpersError:
        """Return `error` as an exception of this package.

        A `ServiceUnavailable`, which is logged, has no text of the server's reply, because that may quote a prompt.
        """
        body, status = getattr(error, "body", None), getattr(error, "status_code", None)
        is_in_stream = status is None and body is not None
        if is_in_stream and isinstance(body, dict):
            status = _STATUSES.get(str(body.get("type")), body.get("code"))
        if status in (400, 413, 422):
            return InvalidRequest(_message(body))
        if status == 429:
            response = getattr(error, "response", None)
            seconds = "" if response is None else response.headers.get("retry-after", "")
            return QueueFull(f"The service's queue is full. Ask again in {seconds if seconds.isdecimal() else 1} s.")
        if is_in_stream:
            return GenerationFailed(f"The service failed: {_message(body)}")
        if status in (401, 403):
            return WrongSetup(
                f"The service refuses the gateway's key. Set {KEY_VARIABLE} in the gateway's environment to a key that "
                "it accepts."
            )
        if status == 404:
            return WrongSetup(
                "The service does not know the path or the model. Correct the gateway's --service, which often ends "
                "in /v1, or its --service-model."
            )
        if status is not None:
            return ServiceUnavailable(f"The server at {self.url} answered with status {status}. Look into its log.")
        self.answers = False
        return ServiceUnavailable(
            f"The server at {self.url} does not answer, or went away ({type(error.__cause__ or error).__name__}). "
            "Start it if it does not run, and ask again."
        )


def _context_length(model: Any) -> int | None:
    """Return the context window as this package, vLLM or llama.cpp names it. OpenAI has no field for it."""
    told = model.model_extra or {}
    return told.get("context_length") or told.get("max_model_len") or (told.get("meta") or {}).get("n_ctx")


def _message(body: Any) -> str:
    """Return the sentence in the body of an error: OpenAI's, or FastAPI's."""
    text = body.get("message") or body.get("detail") if isinstance(body, dict) else body
    return " ".join(str(text or "The service gives no reason.").split())[:1000]


def _checked(url: str) -> str:
    """Return `url`. Raise `InvalidRequest` if it is not the URL of an API."""
    if "@" in url:  # the message must not show it
        raise InvalidRequest(f"A service's URL contains a user or a key. Put the key into {KEY_VARIABLE}.")
    try:
        parts = urlsplit(url)
        is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.path.strip("/")
    except ValueError:  # a bracket that does not close, or a port that is not a number
        is_complete = False
    if not is_complete or parts.query or parts.fragment:
        raise InvalidRequest(f"{url!r} is not the URL of an API. Write it like http://127.0.0.1:8000/v1.")
    return url

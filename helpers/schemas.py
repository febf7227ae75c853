"""The documents that cross the wire, and nothing else: DocArray types, no model, no transport.

`PromptDocument(prompt, max_tokens)` and `ModelOutputDocument(token_id, generated_text)` are the
service schemas of the article "Building a streaming API for Llama 2". Every field added to them
has a default, so a client that knows only the article's two classes reads and writes them too.

A stream is any number of `ModelOutputDocument`, one for each token, and then one last that carries
`finish_reason`. A stream without that last document has failed, however it ended.
"""

from typing import Dict, List, Optional

from docarray import BaseDoc
from docarray.typing import ID
from pydantic import ValidationError


class Sampling(BaseDoc):
    """How to generate: the fields that both kinds of request share.

    - ``max_tokens``: at most so many tokens, at least 1; prompt and answer share the model's window.
    - ``temperature``: 0 takes the likeliest token each time (greedy); higher is more varied, up to 2.
    - ``top_p``: sample only from the likeliest tokens that together reach this probability, 0 < p <= 1.
    - ``seed``: the same seed gives the same sample on the same machine, at fp32; at a lower precision
      whoever is answered at the same time may change how numbers are rounded.
    - ``stop``: the answer ends before the first of these strings.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: Optional[int] = None
    stop: List[str] = []


class PromptDocument(Sampling):
    """A request to ``/stream``: the raw text of a prompt, just as the model is to read it."""

    prompt: str


class ChatDocument(Sampling):
    """A request to ``/chat``: a dialog, which the service turns into the model's own prompt.

    ``messages``: ``[{"role": "system" | "user" | "assistant", "content": ...}, ...]``.
    """

    # not a DocList: with pydantic 2, Jina 3.34 cannot tell its gateway the schema of one
    messages: List[Dict[str, str]]


class ModelOutputDocument(BaseDoc):
    """One token of an answer, or the end of it.

    Joined, the `generated_text` of a stream is the tokenizer's own decoding of all its `token_id`
    (up to a stop string). It may be empty while the bytes of a character are still incomplete.

    Set in the first document and in the last:

    - ``prompt_tokens``: what the model read.
    - ``dropped_turns``: the oldest turns of a dialog that were left out to fit the model's window.

    Set only in the last document, which stands for no token (`token_id` is -1):

    - ``finish_reason``: ``stop`` (the model ended its answer, or a stop string came), ``length``
      (`max_tokens` reached) or ``error``.
    - ``completion_tokens``: the documents before this one.
    - ``error``: ``"ClassName: what happened and what to do"``, a class of `helpers.errors`.
    """

    # DocArray's own field, unused: to make one up and read it takes longer than all the others together
    id: Optional[ID] = None
    token_id: int
    generated_text: str
    finish_reason: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    dropped_turns: Optional[int] = None
    error: Optional[str] = None


class CountDocument(BaseDoc):
    """What ``/count`` tells: how much of the model's window the dialog of a `ChatDocument` takes, in tokens.

    All of it, even if that is more than the window holds. Or `error`, as in `ModelOutputDocument`.
    """

    prompt_tokens: int
    context_length: int
    error: Optional[str] = None


class ModelDocument(BaseDoc):
    """What ``/info`` tells: which model is behind the service, and how busy it is."""

    model: str
    precision: str
    device: str
    context_length: int
    steps: int
    live: int
    waiting: int


def what_is_wrong(error: ValidationError) -> str:
    """Which fields of a document do not fit, and why, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)
    )

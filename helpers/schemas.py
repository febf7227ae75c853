"""The documents that cross the wire, as DocArray types.

`PromptDocument(prompt, max_tokens)` and `ModelOutputDocument(token_id, generated_text)` are the schemas of the
article "Building a streaming API for Llama 2". Every field that we add has a default, so a client that knows
only the article's two classes reads and writes these too.

A stream is one `ModelOutputDocument` per token, and then a last one that carries `finish_reason`. A stream
without that last document has failed, however it ended. `helpers.fields` describes and checks the fields.
"""

# No `from __future__ import annotations`, and Optional instead of `| None`: Jina and DocArray read the annotations.
from typing import Optional

from ._jina import ID, QuietDoc, SparseDoc
from .fields import ChatFields, CountFields, ModelFields, OutputFields, PromptFields, SamplingFields


class SamplingDocument(SamplingFields, QuietDoc):
    """The fields that both kinds of request share."""


class PromptDocument(PromptFields, SamplingDocument):
    """A request to ``/stream``."""


class ChatDocument(ChatFields, SamplingDocument):
    """A request to ``/chat``."""


class _Reply(SparseDoc):
    # DocArray's own field. It stays empty: creating and reading an id takes longer than all other fields together.
    id: Optional[ID] = None


class ModelOutputDocument(OutputFields, _Reply):
    """One token of an answer, or the end of the answer."""


class CountDocument(CountFields, _Reply):
    """The reply of ``/count``."""


class ModelDocument(ModelFields, _Reply):
    """The reply of ``/info``."""

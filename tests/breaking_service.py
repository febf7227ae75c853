"""A service as the article deploys one, with or without Jina's gateway, whose model fails in every long answer.

python breaking_service.py MODEL --port N [--gateway] [--break-at STEP]

With STEP 0, the model never fails.
"""

import argparse

from helpers._jina import Deployment, requests
from helpers.executor import TokenStreamingExecutor
from helpers.schemas import ModelOutputDocument, PromptDocument

BREAK_AT = 50
"""The step of an answer in which the model raises, unless the test chooses another."""


class BreakingExecutor(TokenStreamingExecutor):
    def __init__(self, break_at, **kwargs):
        super().__init__(**kwargs)
        self.step, self.break_at = 0, break_at
        self.logits, self.chat_model.model.logits = self.chat_model.model.logits, self.fail_at_the_step

    def fail_at_the_step(self, ids, chunks):
        is_prefill = len(ids) > 1
        self.step = 1 if is_prefill else self.step + 1
        if self.step == self.break_at:
            raise RuntimeError("out of memory")
        return self.logits(ids, chunks)

    @requests(on="/raising")
    async def raising(self, doc: PromptDocument, **kwargs) -> ModelOutputDocument:
        """Fail as the article's endpoint does: raise in the middle of the stream."""
        yield ModelOutputDocument(token_id=10994, generated_text="Hello")
        raise RuntimeError("out of memory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--gateway", action="store_true")
    parser.add_argument("--break-at", type=int, default=BREAK_AT)
    options = parser.parse_args()
    with Deployment(
        uses=BreakingExecutor,
        uses_with={"model": options.model, "break_at": options.break_at},
        host="127.0.0.1",
        port=options.port,
        protocol="grpc",
        include_gateway=options.gateway,
    ) as deployment:
        print("Ready", flush=True)
        deployment.block()

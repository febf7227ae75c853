"""A service as the article deploys one, with Jina's own gateway or without, and with a model that may break.

    python article_service.py MODEL --port N [--gateway] [--break-at STEP]
"""

import argparse
import os

from helpers._jina import Deployment, requests
from helpers.executor import TokenStreamingExecutor
from helpers.schemas import ModelOutputDocument, PromptDocument


class BreakingExecutor(TokenStreamingExecutor):
    """Runs out of memory in the given step of every answer; 0 is never."""

    def __init__(self, break_at: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.break_at, self.step = break_at, 0
        self.chat_model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    @requests(on="/raising")
    async def raising(self, doc: PromptDocument, **kwargs) -> ModelOutputDocument:
        """As the article's endpoint, when its model fails."""
        yield ModelOutputDocument(token_id=10994, generated_text="Hello")
        raise RuntimeError("out of memory")

    def count(self, model, args, kwargs):
        self.step = 1 if kwargs["input_ids"].shape[1] > 1 else self.step + 1
        if self.step == self.break_at:
            raise RuntimeError("out of memory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--gateway", action="store_true")
    parser.add_argument("--break-at", type=int, default=0)
    options = parser.parse_args()
    with Deployment(
        uses=BreakingExecutor,
        uses_with={"model": options.model, "break_at": options.break_at, "parent": os.getpid()},
        host="127.0.0.1",
        port=options.port,
        protocol="grpc",
        include_gateway=options.gateway,
    ) as deployment:
        print("Ready", flush=True)
        deployment.block()

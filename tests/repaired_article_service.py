"""The article's service with its faults repaired by hand, as lesson 3's capstone asks for.

python repaired_article_service.py MODEL
"""

import asyncio
import sys

import torch
from docarray import BaseDoc
from jina import Deployment, Executor, requests
from transformers import AutoModelForCausalLM, AutoTokenizer


class PromptDocument(BaseDoc):
    prompt: str
    max_tokens: int


class ModelOutputDocument(BaseDoc):
    token_id: int
    generated_text: str
    finish_reason: str = ""
    error: str = ""


model_name = sys.argv[1]


class TokenStreamingExecutor(Executor):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokenizer = AutoTokenizer.from_pretrained(model_name)
        self.model = AutoModelForCausalLM.from_pretrained(model_name, device_map="auto")

    def encode(self, prompt):
        prompt, bos = prompt.lstrip(), self.tokenizer.bos_token  # the article's prompt begins with a line break
        has_bos = bos is not None and prompt.startswith(bos)
        ids = self.tokenizer(prompt, add_special_tokens=not has_bos, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    @torch.inference_mode()
    def step(self, ids, past):
        output = self.model(ids, past_key_values=past, use_cache=True)
        return int(output.logits[0, -1].argmax()), output.past_key_values

    @requests(on="/stream")
    async def task(self, doc: PromptDocument, **kwargs) -> ModelOutputDocument:
        ids, past = self.encode(doc.prompt), None
        made, sent, reason, error = [], "", "length", ""
        try:
            for _ in range(doc.max_tokens):
                token_id, past = await asyncio.to_thread(self.step, ids, past)
                if token_id == self.tokenizer.eos_token_id:
                    reason = "stop"
                    break
                made.append(token_id)
                text = self.tokenizer.decode(made)
                piece = "" if text.endswith("�") else text[len(sent) :]
                sent += piece
                yield ModelOutputDocument(token_id=token_id, generated_text=piece)
                ids = torch.tensor([[token_id]], device=self.model.device)
        except Exception as failure:
            reason, error = "error", str(failure)
        rest = self.tokenizer.decode(made)[len(sent) :]
        yield ModelOutputDocument(token_id=-1, generated_text=rest, finish_reason=reason, error=error)


if __name__ == "__main__":
    with Deployment(uses=TokenStreamingExecutor, port=12345, protocol="grpc") as dep:
        dep.block()

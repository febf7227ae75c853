"""A service as a user writes one after the article: an Executor that streams numbers.

python counting_service.py --port N [--no-gateway]
"""

import argparse

from docarray import BaseDoc
from jina import Deployment, Executor, requests


class Number(BaseDoc):
    n: int


class Counting(Executor):
    @requests(on="/count")
    async def count(self, doc: Number, **kwargs) -> Number:
        for n in range(doc.n):
            yield Number(n=n)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--no-gateway", dest="gateway", action="store_false")
    print("Loading, in a line without an end: ", end="", flush=True)
    arguments = parser.parse_args()
    with Deployment(uses=Counting, port=arguments.port, protocol="grpc", include_gateway=arguments.gateway) as dep:
        dep.block()

"""The services behind a gateway. gRPC balances the requests: each service in turn, and only those that serve.

A service serves if gRPC's health protocol says so. The service of this package says so while its queue has room and it
does not stop; a service without this protocol serves whenever it accepts connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel

from ..addresses import bypasses_proxy, host_to_ask, join, split
from ..errors import InvalidRequest, ServiceUnavailable
from ..fields import ModelFields, NoFields
from ..options import check_port
from ..transport import Call, SharedChannel

SECONDS_TO_ANSWER = 5
"""How long a service may take to describe its model. Prometheus waits 10 s for all metrics."""
_SECONDS_FOR_THE_OTHERS = 1
"""How long the description of one service waits for those of the others. A frozen one must not hold up an answer."""
_OPTIONS: dict[str, Any] = {
    "grpc.service_config": json.dumps(
        {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    ),
    # A service that is frozen keeps its connection. gRPC pings it after 5 s of silence, and closes the connection if no
    # reply comes within 5 s. Both timeouts are needed: grpcio 1.68 waits for the longer one, a minute by default.
    "grpc.keepalive_time_ms": 5000,
    "grpc.keepalive_timeout_ms": 5000,
    "grpc.http2.ping_timeout_ms": 5000,
    "grpc.http2.max_pings_without_data": 0,
    # a service that has been restarted is found within a second
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    # a name is looked up again when a connection ends
    "grpc.dns_min_time_between_resolutions_ms": 1000,
}

Fields = TypeVar("Fields", bound=BaseModel)
Model = TypeVar("Model")


class Services:
    """One service, or several that run the same model. Nothing is sent before the first call.

    `addresses` are ``HOST:PORT``. A DNS name stands for all its addresses. The constructor raises `InvalidRequest` for
    an address that is not one, and if one of several is a name, or of another IP version than the first.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = [(host_to_ask(host), check_port(port)) for host, port in map(split, addresses)]
        options = dict(_OPTIONS)
        if all(bypasses_proxy(host) for host, _ in self._addresses):
            options["grpc.enable_http_proxy"] = 0
        self._channel = SharedChannel(_target(self._addresses), options)
        self.count = len(self._addresses)
        """The number of services when their names were last looked up."""

    def call(self, endpoint: str, request: BaseModel, reply_type: type[Fields]) -> Call[Fields]:
        """Return a request to the next service that serves.

        If none serves, it goes to one that accepts connections, because that one knows why: its queue may be full.
        """
        host, port = self._addresses[0]
        return Call(endpoint, request, reply_type, host, port, shared=self._channel)

    async def describe(self, *, patient: bool = False) -> dict[str, ModelFields | ServiceUnavailable]:
        """Ask all services at once for their model and load. Return each reply, or why there is none, by ``HOST:PORT``.

        Wait 5 seconds for each reply. If not `patient`, wait only 1 second when any service has replied by then.
        """
        asking = {join(*address): _describe(*address) for address in await self._look_up()}
        return await first_replies(asking, patient=patient)

    async def close(self) -> None:
        """Close the connections. The next call opens them again."""
        self._channel.close()

    async def _look_up(self) -> list[tuple[str, int]]:
        """Return the addresses of all services. A name without an address stays a name, which cannot be reached."""
        found: dict[tuple[str, int], None] = {}
        loop = asyncio.get_running_loop()
        for host, port in self._addresses:
            try:
                for _, _, _, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                    found[str(address[0]), port] = None
            except (OSError, UnicodeError):
                found[host, port] = None
        self.count = len(found)
        return list(found)


async def first_replies(
    asking: Mapping[str, Coroutine[Any, Any, Model | ServiceUnavailable]], *, patient: bool
) -> dict[str, Model | ServiceUnavailable]:
    """Ask at once, and return each reply by the name of its service.

    If not `patient`, wait only 1 second for the others when any service has described its model by then.
    """
    tasks = {name: asyncio.ensure_future(question) for name, question in asking.items()}
    try:
        done, missing = await asyncio.wait(tasks.values(), timeout=None if patient else _SECONDS_FOR_THE_OTHERS)
        if missing and all(isinstance(task.result(), ServiceUnavailable) for task in done):
            await asyncio.wait(missing)
        return {name: task.result() if task.done() else too_slow(name) for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def _target(addresses: Sequence[tuple[str, int]]) -> str:
    """Return the addresses in gRPC's form."""
    names = [join(*address) for address in addresses]
    if len(names) == 1:
        return names[0]
    versions = {_ip_version(host) for host, _ in addresses}
    if len(versions) > 1 or None in versions:
        raise InvalidRequest(
            f"{', '.join(names)} are not all IPv4 addresses, or all IPv6 addresses. Give addresses of one version, or "
            "a single name that stands for all services."
        )
    return f"ipv{versions.pop()}:{','.join(names)}"


def _ip_version(host: str) -> int | None:
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None


async def _describe(host: str, port: int) -> ModelFields | ServiceUnavailable:
    call = Call("/info", NoFields(), ModelFields, host, port)
    try:
        async with aclosing(call.documents_async()) as documents:
            return await asyncio.wait_for(anext(documents), SECONDS_TO_ANSWER)
    except ServiceUnavailable as error:
        return error
    except asyncio.TimeoutError:
        return too_slow(join(host, port))
    except StopAsyncIteration:
        return ServiceUnavailable(f"{join(host, port)} does not describe its model. Check the gateway's --service.")


def too_slow(name: str) -> ServiceUnavailable:
    """Return what to say about a service that does not reply in time."""
    return ServiceUnavailable(f"The service at {name} did not describe its model in time. Look into its log.")

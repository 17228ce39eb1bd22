"""A member that answers as the test says: for what no sound etcd does when asked to."""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from leasehold.store.connection import Method


@asynccontextmanager
async def member(answers: dict[Method[Any, Any], Callable[..., Any]]) -> AsyncIterator[str]:
    """The endpoint of a server of these methods.

    An answer is a coroutine of a request and a gRPC context, or an asynchronous generator of an iterator of
    requests and a context.
    """
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for method, answer in answers.items():
        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if inspect.isasyncgenfunction(answer)
            else grpc.unary_unary_rpc_method_handler
        )
        handler = make(answer, method.request.FromString, method.reply.SerializeToString)
        service, name = method.path[1:].split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop(None)

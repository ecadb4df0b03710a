"""What Ray Serve's gRPC ingress needs to know: which methods there are."""

from __future__ import annotations

from typing import Any

from mlops_ray.serving.grpc.messages import SERVICE, method_names

SERVICER = "mlops_ray.serving.grpc.service.add_to_server"
"""The name by which Serve's ``grpc_servicer_functions`` find ``add_to_server``."""


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service's methods, as generated code would.

    Messages stay bytes until a replica reads them, which refuses large ones before that.
    """
    import grpc

    handlers = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name))
        for name in method_names()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

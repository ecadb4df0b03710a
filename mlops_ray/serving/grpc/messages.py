"""The protocol's messages, in a descriptor pool of their own.

A process may hold other modules that declare the same names: clients of Triton and KServe do, and
protobuf refuses to load a name twice into one pool. What is loaded is a set of descriptors, not
generated code, which would work with few versions of protobuf only.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

SERVICE = "inference.GRPCInferenceService"

_DESCRIPTORS = "open_inference.binpb"
_PACKAGE = "inference"


@cache
def message_class(name: str) -> Any:
    """Return the class of a message, such as ``ModelInferRequest``. KeyError where there is none."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def method_names() -> list[str]:
    """Return the names of the service's methods."""
    return [method.name for method in _pool().FindServiceByName(SERVICE).methods]


@cache
def _pool() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool

    content = resources.files(__package__).joinpath(_DESCRIPTORS).read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(content).file:
        pool.Add(file)
    return pool

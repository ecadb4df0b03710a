"""The service's methods as Ray Serve calls them in a replica: by name."""

from __future__ import annotations

from typing import Any

from mlops_ray.serving.grpc.inference import Inference, Reply


class InferenceMethods:
    """A replica's class inherits them, and sets ``_inference``.

    ``grpc_context`` takes status and metadata back to the client.
    """

    _inference: Inference

    async def ServerLive(self, request: bytes, grpc_context: Any) -> Reply:  # noqa: N802
        """Say that the process lives."""
        return await self._inference.answer("ServerLive", request, grpc_context)

    async def ServerReady(self, request: bytes, grpc_context: Any) -> Reply:  # noqa: N802
        """Say whether there is a model to answer with."""
        return await self._inference.answer("ServerReady", request, grpc_context)

    async def ServerMetadata(self, request: bytes, grpc_context: Any) -> Reply:  # noqa: N802
        """Name the server and its version."""
        return await self._inference.answer("ServerMetadata", request, grpc_context)

    async def ModelReady(self, request: bytes, grpc_context: Any) -> Reply:  # noqa: N802
        """Say whether a model, or one version of it, answers."""
        return await self._inference.answer("ModelReady", request, grpc_context)

    async def ModelMetadata(self, request: bytes, grpc_context: Any) -> Reply:  # noqa: N802
        """Name a model's versions, inputs and outputs."""
        return await self._inference.answer("ModelMetadata", request, grpc_context)

    async def ModelInfer(self, request: bytes, grpc_context: Any) -> Reply:  # noqa: N802
        """Predict."""
        return await self._inference.answer("ModelInfer", request, grpc_context)

"""What a server does at least: the handler that the serving benchmark gives to Ray Serve bare."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import torch
from starlette.requests import Request
from starlette.responses import Response


class Bare:
    """Parses and predicts, nothing else."""

    def __init__(self, script: str) -> None:
        torch.set_num_threads(1)
        self._model = torch.jit.load(script)

    async def __call__(self, request: Request) -> Response:
        inputs = orjson.loads(await request.body())["inputs"]
        with torch.inference_mode():
            scores = self._model(torch.from_numpy(np.array(inputs, dtype=np.float32)))
        content = orjson.dumps({"scores": scores.numpy()}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")


def build(args: dict[str, Any]) -> Any:
    """Return the Serve application; ``args`` hold the path of the TorchScript."""
    from ray import serve

    deployment: Any = serve.deployment(
        name="bare",
        max_ongoing_requests=int(args["max_ongoing_requests"]),
        ray_actor_options={"num_cpus": 1},
        # As ours: with a lower level Serve would make a record of each request before it drops it.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Bare)
    return deployment.bind(args["script"])

"""FastAPI on uvicorn for the serving benchmark; started with a port and the path of a TorchScript.

One process, uvloop and httptools. The handler reads the body itself, which is faster than a pydantic
model of it.
"""

from __future__ import annotations

import sys

import numpy as np
import orjson
import torch
import uvicorn
from fastapi import FastAPI, Request, Response


def make(script: str) -> FastAPI:
    torch.set_num_threads(1)
    model = torch.jit.load(script)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        inputs = orjson.loads(await request.body())["inputs"]
        with torch.inference_mode():
            scores = model(torch.from_numpy(np.array(inputs, dtype=np.float32)))
        content = orjson.dumps({"scores": scores.numpy()}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")

    return app


if __name__ == "__main__":
    uvicorn.run(make(sys.argv[2]), port=int(sys.argv[1]), log_level="warning", access_log=False)

"""LitServe for the serving benchmark; started with a port and the path of a TorchScript."""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np
import torch


class Returns(litserve.LitAPI):  # type: ignore[misc]
    """The model in the one inference process; the HTTP server has its own."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self._model: Any = torch.jit.load(sys.argv[2])

    # LitServe reads annotations; one that is no class here would make it refuse every request.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return torch.from_numpy(np.array(request["inputs"], dtype=np.float32))

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scores: torch.Tensor = self._model(inputs)
        return scores

    def encode_response(self, scores: torch.Tensor) -> dict[str, Any]:
        return {"scores": scores.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Returns(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )

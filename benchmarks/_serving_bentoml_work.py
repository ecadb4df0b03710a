"""BentoML for the serving benchmark; ``bentoml serve`` imports it, $SCRIPT is the TorchScript."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
import torch


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Returns:
    """One worker process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._model: Any = torch.jit.load(os.environ["SCRIPT"])

    # A coroutine is not handed to a thread, which is faster for a model this small.
    @bentoml.api
    async def predict(self, inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            scores: np.ndarray = self._model(torch.from_numpy(inputs.astype(np.float32))).numpy()
        return scores

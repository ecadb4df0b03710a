"""MLflow for the serving benchmark: writes a model with a tensor signature and serves it.

Started with a port and the path of a TorchScript, in whose folder the model is written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types.schema import Schema, TensorSpec


class Returns(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """The TorchScript, in one thread."""

    def load_context(self, context: Any) -> None:
        torch.set_num_threads(1)
        self._model = torch.jit.load(context.artifacts["script"])

    # MLflow takes annotations for a schema, which the signature is already.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        with torch.inference_mode():
            return self._model(torch.from_numpy(model_input)).numpy()


def main() -> None:
    port, script = sys.argv[1:]
    folder = Path(script).with_suffix(".mlflow")
    width = int(os.environ["WIDTH"])
    floats = np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(floats, (-1, width))]),
        outputs=Schema([TensorSpec(floats, (-1,))]),
    )
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=Returns(),
        artifacts={"script": script},
        signature=signature,
        pip_requirements=[],
    )
    program = str(Path(sys.executable).parent / "mlflow")
    # MLflow starts programs by their names.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    where = ["--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    os.execv(program, [program, "models", "serve", "--model-uri", str(folder), *where])


if __name__ == "__main__":
    main()

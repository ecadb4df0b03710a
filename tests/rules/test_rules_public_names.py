"""The public names: this list, and nothing else; importing the package stays light."""

from __future__ import annotations

import subprocess
import sys

import mlops_ray
from mlops_ray import errors

PUBLIC = {
    "AsyncClient",
    "Client",
    "Context",
    "Explanation",
    "Hedging",
    "Prediction",
    "Retries",
    "Run",
    "Session",
    "__version__",
    "connect",
    "effect",
    "ensure",
    "workflow",
} | {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.MlopsRayError)
}


def test_the_public_names_are_these_and_all_resolve() -> None:
    assert set(mlops_ray.__all__) == PUBLIC
    assert all(getattr(mlops_ray, name) is not None for name in PUBLIC)


def test_importing_the_package_or_checking_a_config_loads_nothing_heavy() -> None:
    code = (
        "import sys, mlops_ray, mlops_ray.orchestration.load, mlops_ray.cli.main;"
        "print([m for m in ('ray', 'torch', 'mlflow', 'pyarrow', 'deltalake') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_survives_pickling_with_its_data() -> None:
    import pickle

    problem = errors.Problem("a.b", "wrong", "file.yaml", 3)
    for error in (
        errors.ConfigError([problem]),
        errors.StepError("it broke", step="fit", run_id="r1", detail="trace", fix="mend"),
        errors.RequestError("no", status=422, field="x", row=1),
        errors.ClusterError("gone", where="here", why="because", fix="look"),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert back.__dict__ == error.__dict__

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlops_ray.config.features import FeatureService
from mlops_ray.config.training import Model
from mlops_ray.errors import RegistryError
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.profile import Reference
from mlops_ray.metadata.records import RunRecord
from mlops_ray.metadata.types import Report
from mlops_ray.orchestration.context import Context
from mlops_ray.registry import steps
from mlops_ray.registry.registry import LINEAGE_KEYS, Registry

REPORT = Report(rows=100, positives=40, auc=0.71, log_loss=0.6, calibration_error=0.02)
LINEAGE = {
    "data_version": '{"weather":3}',
    "code_commit": "abc",
    "dirty_digest": "clean",
    "config_digest": "c0ffee",
    "lock_digest": "10c4",
    "parent_run": "run-1",
}


def make_package(path: Path, weight: float = 1.0) -> Path:
    service = FeatureService.model_validate(
        {"views": [], "inputs": {"at": {"dtype": "timestamp"}}, "time": "at"}
    )
    spec = packages.EncoderSpec(
        numeric=("x",),
        means=(0.0,),
        stds=(1.0,),
        indicators=(),
        clip=4.0,
        categorical=(),
        vocabularies=(),
    )
    manifest = packages.Manifest(
        model=Model.model_validate({"_target_": "mlops_ray.training.models.TabularNet", "d": 1}),
        encoder=spec,
        service_name="all",
        service=service,
        label="label",
        time="at",
        training={
            "seed": 7,
            "history": [
                {"epoch": 1, "validation_auc": 0.6},
                {"epoch": 2, "validation_auc": 0.7},
            ],
            "settings": {"learning_rate": 0.001},
        },
    )
    weights = {"w": np.array([weight], dtype=np.float32)}
    packages.write(path, manifest, weights, Reference.fit({"x": np.arange(10.0)}, 4))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("registry") / "home")


@pytest.fixture(scope="module")
def registry(home: Home) -> Registry:
    return Registry(home)


@pytest.fixture(scope="module")
def client(home: Home) -> Any:
    """MLflow's own client, opened as a user would."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=home.tracking_uri)


@pytest.fixture(scope="module")
def versions(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("packages")
    first = registry.register("tiny", make_package(folder / "one", 1.0), REPORT, LINEAGE)
    second = registry.register(
        "tiny", make_package(folder / "two", 2.0), REPORT, LINEAGE | {"parent_run": "run-2"}
    )
    registry.set_alias("tiny", "champion", 1)
    registry.set_alias("tiny", "challenger", 2)
    return first, second


def test_versions_count_up_and_hold_the_packages(versions, registry):
    first, second = versions
    assert (first.version, second.version) == (1, 2)
    assert registry.versions("tiny") == [first, second]
    for found, weight in ((first, 1.0), (second, 2.0)):
        package = packages.read(found.package)
        assert package.weights["w"].tolist() == [weight]
        assert package.digest == found.digest


def test_references_resolve(versions, registry):
    first, second = versions
    assert registry.resolve("tiny@champion") == first
    assert registry.resolve("tiny@2") == second
    assert registry.aliases("tiny") == {"challenger": 2, "champion": 1}
    assert registry.models() == ["tiny"]
    assert registry.find("tiny@nobody") is None
    assert registry.find("nothing@1") is None


def test_an_alias_moves_and_moves_back(versions, registry):
    registry.set_alias("tiny", "candidate", 1)
    registry.set_alias("tiny", "candidate", 2)
    assert registry.resolve("tiny@candidate").version == 2


@pytest.mark.parametrize(
    ("ref", "message", "fix"),
    [
        ("tinny@1", "no model 'tinny'", "did you mean 'tiny'?"),
        ("tiny@champoin", "no alias 'champoin'", "did you mean 'champion'?"),
        ("tiny@9", "no version '9'", "1, 2"),
        ("tiny", "names no model version", "name@alias"),
        ("tiny@", "names no model version", "name@alias"),
        ("a b@1", "names no model version", "name@alias"),
    ],
)
def test_an_unknown_reference_says_what_there_is(versions, registry, ref, message, fix):
    with pytest.raises(RegistryError, match=message) as caught:
        registry.resolve(ref)
    assert fix in caught.value.fix


@pytest.mark.parametrize("alias", ["latest", "v3", "a b"])
def test_aliases_that_mlflow_refuses_are_refused_clearly(versions, registry, alias):
    with pytest.raises(RegistryError, match="cannot be an alias"):
        registry.set_alias("tiny", alias, 1)


def test_a_version_that_is_not_there_gets_no_alias(versions, registry):
    with pytest.raises(RegistryError, match="no version"):
        registry.set_alias("tiny", "champion", 17)


def test_files_that_are_gone_are_said(registry, versions, tmp_path):
    import shutil

    path = make_package(tmp_path / "gone", 5.0)
    version = registry.register("fragile", path, REPORT, LINEAGE)
    shutil.rmtree(version.package)
    with pytest.raises(RegistryError, match="files of fragile@1 are gone"):
        registry.resolve("fragile@1")


def test_registering_again_from_the_same_run_makes_no_second_version(registry, tmp_path):
    path = make_package(tmp_path / "same", 3.0)
    one = registry.register("again", path, REPORT, LINEAGE, alias="candidate")
    two = registry.register("again", path, REPORT, LINEAGE, alias="candidate")
    assert one == two
    assert len(registry.versions("again")) == 1


def test_every_version_knows_the_run_that_registered_it(versions, registry):
    found = registry.origins()
    assert found["tiny@1"] == LINEAGE["parent_run"]
    assert found["tiny@2"] == "run-2"


def test_describe_has_everything_that_a_person_asks(versions, registry):
    found = registry.describe("tiny@2")
    assert found["lineage"] == LINEAGE | {"parent_run": "run-2"}
    assert set(LINEAGE_KEYS) == set(found["lineage"])
    assert found["aliases"] == ["candidate", "challenger"] or "challenger" in found["aliases"]
    assert found["metrics"]["test_auc"] == 0.71
    assert found["metrics"]["validation_auc"] == 0.7
    assert found["params"]["training.learning_rate"] == "0.001"
    assert found["report"]["log_loss"] == 0.6
    assert found["training"]["seed"] == 7
    assert found["digest"] == versions[1].digest


def test_mlflows_own_client_sees_what_its_users_expect(versions, client):
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    version = client.get_model_version_by_alias("tiny", "champion")
    run = client.get_run(version.run_id)
    assert run.data.metrics["test_log_loss"] == 0.6
    assert run.data.tags["lineage.code_commit"] == "abc"
    assert version.tags["lineage.parent_run"] == "run-1"
    history = client.get_metric_history(version.run_id, "validation_auc")
    assert [(m.step, m.value) for m in history] == [(1, 0.6), (2, 0.7)]
    names = {item.path for item in client.list_artifacts(version.run_id, "package")}
    assert names == {
        f"package/{n}" for n in ("package.json", "reference.json", "weights.safetensors")
    }


def test_two_processes_may_open_a_new_home_at_once(tmp_path):
    package = make_package(tmp_path / "package")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from mlops_ray.metadata.home import Home\n"
        "from mlops_ray.metadata.types import Report\n"
        "from mlops_ray.registry.registry import Registry\n"
        "report = Report(rows=1, positives=1, auc=.5, log_loss=1, calibration_error=0)\n"
        "home = Home(Path(sys.argv[1]))\n"
        "for number in range(3):\n"
        "    lineage = {'parent_run': f'{sys.argv[3]}-{number}'}\n"
        "    Registry(home).register('both', Path(sys.argv[2]), report, lineage)\n"
    )
    home = Home(tmp_path / "home")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(home.root), str(package), name],
            stderr=subprocess.PIPE,
        )
        for name in ("a", "b")
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert [found.version for found in Registry(home).versions("both")] == [1, 2, 3, 4, 5, 6]


def test_the_step_adds_the_provenance_of_its_run(home, tmp_path):
    ledger = Ledger(home.ledger_url)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    ledger.start_run(
        RunRecord(
            run_id="run-9",
            project="tiny",
            workflow="train",
            status="running",
            config_digest="c0",
            started_at=moment,
            ended_at=None,
            owner="me",
            config={},
            provenance={"commit": "abc", "dirty_digest": None, "lock_digest": "10"},
        ),
        ["register"],
    )
    ledger.close()
    context = Context("tiny", home, "run-9", "register")
    version = steps.register(
        context,
        "stepped",
        make_package(tmp_path / "p"),
        REPORT,
        "candidate",
        {"data_version": {"v": 1}, "data_until": None},
    )
    lineage = Registry(home).describe("stepped@candidate")["lineage"]
    assert version.version == 1
    assert lineage == {
        "data_version": '{"v":1}',
        "code_commit": "abc",
        "dirty_digest": None,
        "config_digest": "c0",
        "lock_digest": "10",
        "parent_run": "run-9",
    }

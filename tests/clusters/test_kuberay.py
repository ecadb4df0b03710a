"""The KubeRay manifests: well formed for ray.io/v1, guarded by the token, bounded."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from mlops_ray.config.locate import open_workspace
from mlops_ray.delivery.application import Arguments
from mlops_ray.orchestration.load import load_project

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "clusters" / "kuberay"
SCHEMA = yaml.safe_load(Path(__file__).with_name("kuberay.schema.yaml").read_text())
CLUSTER_KEY = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}
SECRET = {"name": "mlops-ray-token", "key": "auth_token"}

Manifest = dict[str, Any]


def load(kind: str) -> Manifest:
    return yaml.safe_load((FOLDER / FILES[kind]).read_text())


def cluster_of(manifest: Manifest) -> Manifest:
    key = CLUSTER_KEY[manifest["kind"]]
    return manifest["spec"] if key is None else manifest["spec"][key]


def groups_of(manifest: Manifest) -> list[Manifest]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container_of(group: Manifest) -> Manifest:
    return group["template"]["spec"]["containers"][0]


def env_of(group: Manifest) -> Manifest:
    return {item["name"]: item for item in container_of(group).get("env", [])}


def gpus_of(group: Manifest) -> int:
    return int(container_of(group)["resources"]["limits"].get("nvidia.com/gpu", 0))


def check_schema(manifest: Manifest) -> None:
    jsonschema.validate(manifest, SCHEMA)


def check_auth(manifest: Manifest) -> None:
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token", "secretName": SECRET["name"]}
    for group in groups_of(manifest):
        env = env_of(group)
        assert env["RAY_AUTH_MODE"] == {"name": "RAY_AUTH_MODE", "value": "token"}
        assert env["RAY_AUTH_TOKEN"] == {
            "name": "RAY_AUTH_TOKEN",
            "valueFrom": {"secretKeyRef": SECRET},
        }


def check_resources(manifest: Manifest) -> None:
    for group in groups_of(manifest):
        resources = container_of(group)["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
        # Ray sizes itself by the limit: with a smaller request, using it invites eviction.
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store <= 0.4 * int(resources["limits"]["memory"].removesuffix("Gi")) * 2**30


def check_autoscaling(manifest: Manifest) -> None:
    cluster = cluster_of(manifest)
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] <= 100, group[
            "groupName"
        ]
    assert any(group["maxReplicas"] > group["minReplicas"] for group in cluster["workerGroupSpecs"])


def check_groups(manifest: Manifest) -> None:
    workers = cluster_of(manifest)["workerGroupSpecs"]
    gpu = [group for group in workers if gpus_of(group)]
    cpu = [group for group in workers if not gpus_of(group)]
    assert cpu, "no CPU group"
    assert gpu, "no GPU group"
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in gpu)
    for group in gpu:
        assert container_of(group)["resources"]["requests"]["nvidia.com/gpu"] == gpus_of(group)
    assert len({group["groupName"] for group in workers}) == len(workers)


def check_image(manifest: Manifest) -> None:
    images = {container_of(group)["image"] for group in groups_of(manifest)}
    assert len(images) == 1, f"head and workers must run the same image: {images}"
    tag = images.pop().rpartition(":")[2]
    assert tag not in {"latest", ""}, "an unpinned tag lets pods of one cluster differ"


def check_ray_version(manifest: Manifest) -> None:
    assert cluster_of(manifest)["rayVersion"] == ray.__version__


def check_home(manifest: Manifest) -> None:
    claim = yaml.safe_load((FOLDER / "storage.yaml").read_text())
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups_of(manifest):
        home = env_of(group)["MLOPS_RAY_HOME"]["value"]
        mounts = {
            mount["mountPath"]: mount["name"] for mount in container_of(group)["volumeMounts"]
        }
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert (
            volumes[mounts[home]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        )
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == 1000


def check_serve_mode(manifest: Manifest) -> None:
    for group in groups_of(manifest):
        assert env_of(group)["RAY_SERVE_THROUGHPUT_OPTIMIZED"]["value"] == "1"


def check_metrics(manifest: Manifest) -> None:
    for group in groups_of(manifest):
        ports = {port["name"]: port["containerPort"] for port in container_of(group)["ports"]}
        assert group["rayStartParams"]["metrics-export-port"] == str(ports["metrics"])


def check_probes(manifest: Manifest) -> None:
    for group in groups_of(manifest):
        assert not {"livenessProbe", "readinessProbe"} & container_of(group).keys(), (
            "KubeRay's defaults are wanted"
        )


CHECKS = [
    check_schema,
    check_auth,
    check_resources,
    check_autoscaling,
    check_groups,
    check_image,
    check_ray_version,
    check_home,
    check_serve_mode,
    check_metrics,
    check_probes,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", FILES)
def test_manifest(kind: str, check: Callable[[Manifest], None]) -> None:
    manifest = load(kind)
    assert manifest["kind"] == kind
    check(manifest)


def drop(key: str) -> Callable[[Manifest], None]:
    return lambda part: part.pop(key)


def put(key: str, value: Any) -> Callable[[Manifest], None]:
    return lambda part: part.__setitem__(key, value)


def drop_env(name: str) -> Callable[[Manifest], None]:
    return lambda group: container_of(group)["env"].remove(env_of(group)[name])


def inline_token(group: Manifest) -> None:
    env = container_of(group)["env"]
    env[env.index(env_of(group)["RAY_AUTH_TOKEN"])] = {"name": "RAY_AUTH_TOKEN", "value": "s3cret"}


# (check that must notice, where, what is broken)
# where: the cluster, the head group, or a worker group by its name
BREAKS = [
    (check_schema, "cluster", drop("headGroupSpec")),
    (check_schema, "cluster", put("enableInTreeAutoscaling", "yes")),
    (check_schema, "cluster", put("enableInTreeAutoscalling", True)),
    (check_schema, "cluster", put("rayVersion", 2.6)),
    (check_schema, "head", drop("template")),
    (check_schema, "head", put("rayStartParams", {"num-cpus": 0})),
    (check_schema, "head", lambda group: group["template"]["spec"].pop("containers")),
    (check_schema, "head", lambda group: container_of(group).pop("image")),
    (
        check_schema,
        "head",
        lambda group: container_of(group)["resources"]["limits"].update(memory="8 GB"),
    ),
    (check_schema, "cpu", drop("groupName")),
    (check_schema, "cpu", drop("maxReplicas")),
    (check_schema, "gpu", put("minReplicas", -1)),
    (check_auth, "cluster", drop("authOptions")),
    (check_auth, "head", drop_env("RAY_AUTH_MODE")),
    (check_auth, "gpu", drop_env("RAY_AUTH_TOKEN")),
    (check_auth, "cpu", inline_token),
    (check_resources, "cpu", lambda group: container_of(group).pop("resources")),
    (
        check_resources,
        "head",
        lambda group: group["rayStartParams"].update({"object-store-memory": "9000000000"}),
    ),
    (check_autoscaling, "cluster", put("enableInTreeAutoscaling", False)),
    (check_autoscaling, "cpu", put("maxReplicas", 0)),
    (check_groups, "cluster", lambda cluster: cluster["workerGroupSpecs"].pop()),
    (check_groups, "gpu", put("minReplicas", 1)),
    (check_image, "gpu", lambda group: container_of(group).update(image="other:1")),
    (check_ray_version, "cluster", put("rayVersion", "2.59.0")),
    (check_home, "gpu", lambda group: container_of(group)["volumeMounts"].clear()),
    (check_serve_mode, "cpu", drop_env("RAY_SERVE_THROUGHPUT_OPTIMIZED")),
    (check_metrics, "cpu", lambda group: group["rayStartParams"].pop("metrics-export-port")),
    (check_probes, "head", lambda group: container_of(group).update(livenessProbe={})),
]


@pytest.mark.parametrize("number", range(len(BREAKS)))
@pytest.mark.parametrize("kind", FILES)
def test_broken_manifest_is_noticed(kind: str, number: int) -> None:
    check, where, damage = BREAKS[number]
    # YAML anchors make groups share parts: each gets its own, so that only one is damaged.
    manifest = unshared(load(kind))
    cluster = cluster_of(manifest)
    named = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    damage({"cluster": cluster, "head": cluster["headGroupSpec"], **named}[where])
    with pytest.raises((AssertionError, KeyError, jsonschema.ValidationError)):
        check(manifest)


def unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("RayJob", "entrypoint", None),
        ("RayJob", "rayClusterSpec", None),
        ("RayJob", "submissionMode", "Http"),
        ("RayJob", "shutdownAfterJobFinishes", None),
        ("RayService", "serveConfigV2", None),
        ("RayService", "serveConfigV2", {"applications": []}),
        ("RayService", "rayClusterConfig", None),
    ],
)
def test_broken_spec_is_noticed(kind: str, key: str, value: Any) -> None:
    manifest = deepcopy(load(kind))
    manifest["spec"].pop(key)
    if value is not None:
        manifest["spec"][key] = value
    with pytest.raises(jsonschema.ValidationError):
        check_schema(manifest)


def test_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_job_trains_and_goes_away() -> None:
    spec = load("RayJob")["spec"]
    assert spec["entrypoint"] == "mlops-ray run workflow=train project=flights"
    assert spec["shutdownAfterJobFinishes"] is True


def test_service_deploys_what_serve_accepts() -> None:
    config = yaml.safe_load(load("RayService")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "mlops_ray.delivery.application:build"
    wanted = Arguments.model_validate(application.args)
    assert wanted.aliases == ["champion"]
    project = load_project(open_workspace(ROOT), wanted.overrides)
    assert project.name == application.name == "flights"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_no_secret_in_file(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all(document["kind"] != "Secret" for document in documents), (
        "create the secret by command, not in a file"
    )


class TestDockerfile:
    text = (ROOT / "clusters" / "Dockerfile").read_text()

    def test_installs_with_the_lock(self) -> None:
        assert "FROM python:3.11-slim" in self.text
        assert "pip install -c requirements.lock -e " in self.text

    def test_runs_as_the_user_of_the_manifests(self) -> None:
        assert "--uid 1000 ray" in self.text
        users = [line.split()[1] for line in self.text.splitlines() if line.startswith("USER ")]
        assert users[-1:] == ["ray"]

    def test_carries_what_probes_call(self) -> None:
        assert "wget" in self.text.replace("# wget", "")

    def test_copies_named_paths_only(self) -> None:
        copies = [line for line in self.text.splitlines() if line.startswith(("COPY", "ADD"))]
        assert copies
        assert not any(" . " in line for line in copies)

"""The `ray up` files: accepted by Ray's own validation, offline, and set up as they promise."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "clusters"
CLOUDS = ["aws", "gcp", "azure"]
NAMES = [*CLOUDS, "onprem"]
TOKEN = "~/.ray/auth_token"
COMMANDS = [
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]

Config = dict[str, Any]


def load(name: str) -> Config:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def start_command(config: Config, side: str) -> str:
    (command,) = [line for line in config[f"{side}_start_ray_commands"] if "ray start" in line]
    return command


def flag(command: str, name: str) -> str:
    found = re.search(rf"--{name}=(\S+)", command)
    assert found, f"--{name} is missing in: {command}"
    return found[1]


def environment(command: str) -> dict[str, str]:
    """The variables that prefix `ray start` itself: those of an earlier command do not reach it."""
    prefix = re.search(r"((?:\w+=\S+ +)+)ray start ", command)
    return dict(item.split("=", 1) for item in prefix[1].split()) if prefix else {}


def check_ray(config: Config) -> None:
    validate_config(prepare_config(deepcopy(config)))


def check_auth(config: Config) -> None:
    assert config["file_mounts"][TOKEN] == TOKEN
    for side in ("head", "worker"):
        assert environment(start_command(config, side)).get("RAY_AUTH_MODE") == "token", side


def check_start(config: Config) -> None:
    head, worker = start_command(config, "head"), start_command(config, "worker")
    assert " --head " in head
    assert flag(head, "autoscaling-config") == "~/ray_bootstrap_config.yaml"
    assert flag(worker, "address") == f"$RAY_HEAD_IP:{flag(head, 'port')}"
    assert flag(head, "include-dashboard") == "true"
    assert flag(head, "metrics-export-port") == flag(worker, "metrics-export-port")
    for command in (head, worker):
        assert 10**9 <= int(flag(command, "object-store-memory")) <= 16 * 10**9
        assert environment(command)["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        # Ray's launcher exports OMP_NUM_THREADS=1 ahead of every command.
        assert "unset OMP_NUM_THREADS" in command
    assert environment(head)["MLOPS_RAY_HOME"] == environment(worker)["MLOPS_RAY_HOME"]


def check_bounds(config: Config) -> None:
    ceiling = config["max_workers"]
    if config["provider"]["type"] == "local":
        assert 0 <= config["min_workers"] <= ceiling <= len(config["provider"]["worker_ips"])
        return
    workers = {
        name: kind
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    }
    for kind in workers.values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= ceiling
    assert config["available_node_types"][config["head_node_type"]]["max_workers"] == 0
    cpu = workers["cpu_worker"]
    assert cpu["min_workers"] < cpu["max_workers"], "nothing to scale"
    assert sum(kind["min_workers"] for kind in workers.values()) <= ceiling <= 100


def check_gpu_option(config: Config) -> None:
    gpu = config["available_node_types"]["gpu_worker"]
    assert gpu["min_workers"] == gpu["max_workers"] == 0, (
        "a GPU costs money: switched on by hand only"
    )
    # On AWS Ray looks the resources up from the instance type.
    assert config["provider"]["type"] == "aws" or gpu["resources"]["GPU"] >= 1
    assert gpu["node_config"] != config["available_node_types"]["cpu_worker"]["node_config"]


def check_install(config: Config) -> None:
    install = [line for line in config["setup_commands"] if " -e " in line]
    assert len(install) == 1
    assert "-m pip install --quiet -c requirements.lock -e " in install[0]
    extra = [line for line in config.get("head_setup_commands", []) if "pip install" in line]
    assert all("-c requirements.lock" in line for line in extra)
    assert any("3.11" in line for line in config["setup_commands"])
    mounted = {local for local in config["file_mounts"].values() if local != TOKEN}
    assert {"mlops_ray", "configs", "pyproject.toml", "requirements.lock"} <= mounted
    for remote, local in config["file_mounts"].items():
        assert local == TOKEN or remote == f"~/mlops-ray/{local}"


CHECKS = [check_ray, check_auth, check_start, check_bounds, check_install]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_file(name: str, check: Callable[[Config], None]) -> None:
    check(load(name))


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_is_an_option(name: str) -> None:
    check_gpu_option(load(name))


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_can_be_switched_on(name: str) -> None:
    config = load(name)
    config["available_node_types"]["gpu_worker"]["max_workers"] = 2
    check_ray(config)
    check_bounds(config)


def test_providers_are_the_four() -> None:
    assert [load(name)["provider"]["type"] for name in NAMES] == ["aws", "gcp", "azure", "local"]


def test_aws_does_not_fall_back_to_the_default_image() -> None:
    for kind in load("aws")["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("ami-")


def test_onprem_says_how_workers_start() -> None:
    assert "RAY_UP_enable_autoscaler_v2=0 ray up" in (FOLDER / "onprem.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_validation_needs_no_cloud_sdk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("boto3", "botocore", "googleapiclient", "google.oauth2", "azure"):
        monkeypatch.setitem(sys.modules, module, None)
    check_ray(load(name))


@pytest.mark.parametrize("side", ["head", "worker"])
@pytest.mark.parametrize("name", NAMES)
def test_what_ray_start_gets(name: str, side: str, tmp_path: Path) -> None:
    stand_in = tmp_path / "ray"
    stand_in.write_text('#!/bin/sh\necho "$@"\nenv\n')
    stand_in.chmod(0o755)
    outer = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "RAY_HEAD_IP": "10.0.0.1"}
    command = start_command(load(name), side)
    ran = subprocess.run(["bash", "-c", command], env=outer, capture_output=True, text=True)
    arguments, *variables = ran.stdout.splitlines()
    assert arguments.split()[:2] == [
        "start",
        "--head" if side == "head" else "--address=10.0.0.1:6379",
    ]
    assert {"RAY_AUTH_MODE=token", "RAY_SERVE_THROUGHPUT_OPTIMIZED=1"} <= set(variables)
    assert not any(variable.startswith("OMP_NUM_THREADS=") for variable in variables)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", COMMANDS)
def test_commands_are_shell(name: str, group: str) -> None:
    for command in load(name).get(group, []):
        # As Ray wraps them, in a subshell.
        parsed = subprocess.run(
            ["bash", "-n", "-c", f"true && ({command})"], capture_output=True, text=True
        )
        assert parsed.returncode == 0, f"{command}\n{parsed.stderr}"


@pytest.mark.parametrize("name", NAMES)
def test_no_token_in_file(name: str) -> None:
    assert "RAY_AUTH_TOKEN" not in (FOLDER / f"{name}.yaml").read_text()


class TestWorkingTree:
    locked = pytest.mark.skipif(
        not (ROOT / "requirements.lock").exists(), reason="the lock file is not made yet"
    )

    @locked
    @pytest.mark.parametrize("name", NAMES)
    def test_mounts_exist(self, name: str) -> None:
        local = [path for path in load(name)["file_mounts"].values() if path != TOKEN]
        assert [path for path in local if not (ROOT / path).exists()] == []

    @pytest.mark.parametrize("name", NAMES)
    def test_what_the_build_reads_is_mounted(self, name: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        read = {project["readme"], *project["license-files"]}
        assert read <= set(load(name)["file_mounts"].values())
        dockerfile = (FOLDER / "Dockerfile").read_text()
        assert all(path in dockerfile for path in read)

    @locked
    def test_lock_pins_torch_for_any_machine(self) -> None:
        lock = (ROOT / "requirements.lock").read_text()
        (torch,) = re.findall(r"^torch==(\S+)", lock, re.MULTILINE)
        assert "+" not in torch, "a local version such as +cpu cannot be installed on a GPU node"


def put(value: Any, *keys: str) -> Callable[[Config], None]:
    def damage(config: Config) -> None:
        part = config
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return damage


def drop(*keys: str) -> Callable[[Config], None]:
    def damage(config: Config) -> None:
        part = config
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]

    return damage


def edit(group: str, old: str, new: str) -> Callable[[Config], None]:
    def damage(config: Config) -> None:
        before = config[group]
        config[group] = [line.replace(old, new) for line in before]
        assert config[group] != before, f"{old!r} is not in {group}"

    return damage


# (files, check that must notice, what is broken)
BREAKS = [
    (NAMES, check_ray, put(3, "max_worker")),
    (NAMES, check_ray, drop("provider")),
    (NAMES, check_ray, put("ten", "idle_timeout_minutes")),
    (NAMES, check_ray, put([1], "setup_commands")),
    (NAMES, check_ray, put("ubuntu", "auth", "ssh_usr")),
    (CLOUDS, check_ray, put("boss", "head_node_type")),
    (CLOUDS, check_ray, put(0, "max_workers")),
    (CLOUDS, check_ray, drop("available_node_types", "gpu_worker", "node_config")),
    (CLOUDS, check_ray, put({"GPU": "one"}, "available_node_types", "gpu_worker", "resources")),
    (NAMES, check_auth, drop("file_mounts", TOKEN)),
    (NAMES, check_auth, edit("head_start_ray_commands", "RAY_AUTH_MODE=token ", "")),
    (
        NAMES,
        check_auth,
        edit("worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
    ),
    (
        NAMES,
        check_auth,
        edit("worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token;"),
    ),
    (
        NAMES,
        check_start,
        edit("head_start_ray_commands", "--include-dashboard=true", "--include-dashboard=false"),
    ),
    (NAMES, check_start, edit("worker_start_ray_commands", "--metrics-export-port=8080", "")),
    (
        NAMES,
        check_start,
        edit("worker_start_ray_commands", "--object-store-memory=", "--object-store-memory=99"),
    ),
    (NAMES, check_start, edit("worker_start_ray_commands", "RAY_SERVE_THROUGHPUT_OPTIMIZED=1", "")),
    (NAMES, check_start, edit("worker_start_ray_commands", "unset OMP_NUM_THREADS", "true")),
    (NAMES, check_start, edit("worker_start_ray_commands", ":6379", ":6380")),
    (["onprem"], check_bounds, put(9, "max_workers")),
    (CLOUDS, check_bounds, put(4, "available_node_types", "cpu_worker", "min_workers")),
    (CLOUDS, check_bounds, put(5, "available_node_types", "cpu_worker", "max_workers")),
    (CLOUDS, check_gpu_option, drop("available_node_types", "gpu_worker")),
    (CLOUDS, check_gpu_option, put(1, "available_node_types", "gpu_worker", "max_workers")),
    (NAMES, check_install, edit("setup_commands", "-c requirements.lock ", "")),
    (NAMES, check_install, drop("file_mounts", "~/mlops-ray/requirements.lock")),
]


@pytest.mark.parametrize(
    ("name", "check", "damage"),
    [(name, check, damage) for names, check, damage in BREAKS for name in names],
)
def test_broken_file_is_noticed(
    name: str, check: Callable[[Config], None], damage: Callable[[Config], None]
) -> None:
    config = load(name)
    damage(config)
    with pytest.raises((AssertionError, KeyError, ValueError, jsonschema.ValidationError)):
        check(config)

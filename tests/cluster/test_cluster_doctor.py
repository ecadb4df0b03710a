"""What ``doctor`` finds: each fault is made for real, and its finding says how to mend it."""

from __future__ import annotations

import os
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlops_ray.cluster import doctor
from mlops_ray.cluster.doctor import Finding, examine


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def look(folder: Path, topic: str, **ports: int) -> list[Finding]:
    ports = {"dashboard_port": free_port(), "serve_port": free_port()} | ports
    lock = folder / "requirements.lock"
    findings = examine(folder / "home", lock=lock, **ports)
    return [finding for finding in findings if finding.topic == topic]


def only(findings: list[Finding], level: str) -> Finding:
    (found,) = [finding for finding in findings if finding.level != "ok"]
    assert found.level == level
    return found


def token_file(path: Path, mode: int) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("a-secret")
    path.chmod(mode)
    return path


def test_a_sound_machine_has_nothing_to_mend(tmp_path: Path) -> None:
    token_file(tmp_path / "user/.ray/auth_token", 0o600)
    findings = examine(
        tmp_path, dashboard_port=free_port(), serve_port=free_port(), lock=tmp_path / "none"
    )
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    assert topics == [
        "python",
        "packages",
        "token",
        "ports",
        "memory",
        "disk",
        "ingress",
        "serving",
        "address",
    ]
    machine = {"memory", "disk"}
    assert all(f.level == "ok" and not f.fix for f in findings if f.topic not in machine)
    assert all(f.fix for f in findings if f.level != "ok")


@pytest.mark.parametrize(
    ("port", "key"),
    [("dashboard_port", "cluster.dashboard_port"), ("serve_port", "serving.port")],
)
def test_a_port_in_use_is_named_with_the_key_that_changes_it(
    tmp_path: Path, port: str, key: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        found = only(look(tmp_path, "ports", **{port: number}), "warning")
    assert str(number) in found.message
    assert key in found.fix
    assert all(f.level == "ok" for f in look(tmp_path, "ports", **{port: number}))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_that_others_can_read_is_found_until_it_is_mended(
    tmp_path: Path, mode: int
) -> None:
    path = token_file(tmp_path / "user/.ray/auth_token", mode)
    found = only(look(tmp_path, "token"), "warning")
    assert found.fix == f"chmod 600 {path}"
    path.chmod(0o600)
    (mended,) = look(tmp_path, "token")
    assert mended.level == "ok"
    assert "a-secret" not in mended.message


def test_no_token_yet_and_tokens_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the first local run makes one" in only(look(tmp_path, "token"), "warning").message
    elsewhere = token_file(tmp_path / "elsewhere/token", 0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(elsewhere))
    assert look(tmp_path, "token") == [Finding("token", "ok", str(elsewhere))]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-secret")
    assert look(tmp_path, "token") == [Finding("token", "ok", "taken from RAY_AUTH_TOKEN")]


def test_authentication_that_is_turned_off_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_file(tmp_path / "user/.ray/auth_token", 0o600)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for _ in ("a token file", "a token in the environment"):
        found = only(look(tmp_path, "token"), "problem")
        assert "RAY_AUTH_MODE=disabled" in found.message
        assert "unset RAY_AUTH_MODE" in found.fix
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert all(finding.level == "ok" for finding in look(tmp_path, "token"))


def test_a_package_that_differs_from_the_lock_is_named(tmp_path: Path) -> None:
    torch = metadata.version("torch").partition("+")[0]
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        f"# comment\nRay==1.0.0  # old\ntorch=={torch}\nmlflow==0.1; python_version > '3'\n\nclick\n"
    )
    findings = [f for f in look(tmp_path, "packages") if f.level != "ok"]
    ray, mlflow = sorted(findings, key=lambda f: "mlflow" in f.message)
    assert ray.message == f"ray is {metadata.version('ray')}, the lock says 1.0.0"
    assert ray.fix == "pip install -c requirements.lock ray"
    assert mlflow.message.endswith("the lock says 0.1")


def test_a_package_that_is_missing_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("ray", "no-such-package-here"))
    found = only(look(tmp_path, "packages"), "problem")
    assert "no-such-package-here is not installed" in found.message
    assert found.fix


def test_an_address_that_does_not_answer_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    for written in (address, f"ray://{address}", f"http://{address}"):
        monkeypatch.setenv("RAY_ADDRESS", written)
        found = only(look(tmp_path, "address"), "problem")
        assert f"$RAY_ADDRESS is {written}, which does not answer" in found.message
        assert "unset RAY_ADDRESS" in found.fix


def test_an_address_that_answers_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        (found,) = look(tmp_path, "address")
    assert found.level == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert look(tmp_path, "address") == [Finding("address", "ok", "$RAY_ADDRESS is auto")]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_and_little_memory_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    monkeypatch.setattr(doctor, "_available_memory", lambda: 2**30)
    disk = only(look(tmp_path, "disk"), "warning")
    assert "0.0 GiB free" in disk.message
    assert "MLOPS_RAY_HOME" in disk.fix
    memory = [f for f in look(tmp_path, "memory") if f.level == "warning"]
    assert "1.0 GiB available" in memory[0].message
    assert "serving=plain" in memory[0].fix


def test_a_home_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = only(look(tmp_path, "disk"), "problem")
    assert f"{tmp_path} cannot be written" in found.message
    assert "MLOPS_RAY_HOME" in found.fix


def test_a_look_that_fails_is_a_finding_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "_memory", broken)
    found = only(look(tmp_path, "memory"), "warning")
    assert found.message == "could not be examined: no such device"
    assert look(tmp_path, "address")

"""Starting Serve: ports, environment, options, and what autoscaling decides."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.config.serving import (
    Autoscaling,
    Grpc,
    Placement,
    Routing,
    Security,
    Serving,
)
from mlops_ray.errors import ServingError
from mlops_ray.serving.deployment import ingress, options, runtime
from mlops_ray.serving.deployment.scaling import LATENCY_METRIC, ByLatency


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} cannot be used") as caught:
            ingress.check_port_is_free("127.0.0.1", port)
    assert "serving.port" in caught.value.fix
    ingress.check_port_is_free("127.0.0.1", port)


def test_default_mode_needs_no_environment() -> None:
    assert ingress.environment(Serving(mode="default")) == {}


def test_without_haproxy_the_default_mode_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ingress, "haproxy_binary", lambda: None)
    assert ingress.environment(Serving()) == {}
    assert "default ingress" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_clusters_get_files_and_ports_of_their_own() -> None:
    first, second = ingress.environment(Serving()), ingress.environment(Serving())
    own = {name for name in first if name.endswith(("_PATH", "_LOC", "_BASE", "_FILE"))}
    assert len(own) == 6
    assert all(first[name] != second[name] for name in own)
    assert len(first["RAY_SERVE_HAPROXY_SOCKET_PATH"]) + 57 < 95
    ports = {int(value) for name, value in first.items() if name.endswith("_PORT")}
    assert len(ports) == 8
    assert all(20_000 <= port < 32_000 for port in ports)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(first["RAY_SERVE_HAPROXY_STATS_PORT"])))
        taken.listen()
        third = ingress.environment(Serving())
    assert not {int(value) for name, value in third.items() if name.endswith("_PORT")} & ports


def test_grpc_is_not_sent_in_clear_text(tmp_path: Any) -> None:
    security = Security(certificate=tmp_path / "c.pem", key=tmp_path / "k.pem")
    serving = Serving(mode="default", grpc=Grpc(enabled=True), security=security)
    with pytest.raises(ServingError, match="gRPC cannot speak TLS"):
        runtime._check_can_be_private(serving, throughput=False)
    runtime._check_can_be_private(serving, throughput=True)
    with pytest.raises(ServingError, match=r"c\.pem cannot be read"):
        runtime._check_files(serving)


def test_serve_takes_the_options() -> None:
    """Serve's own schema is the judge; what it has not, it refuses or drops."""
    from ray.serve.schema import DeploymentSchema

    for scaling in (
        Autoscaling(),
        Autoscaling(min_replicas=0, max_replicas=3),
        Autoscaling(max_replicas=2, target_latency="50ms"),
        Autoscaling(
            max_replicas=2, policy="ray.serve.autoscaling_policy.default_autoscaling_policy"
        ),
    ):
        serving = Serving(autoscaling=scaling, num_gpus=0.25, max_queued_requests=0)
        given_options = options.endpoint_options(serving)
        schema = DeploymentSchema.model_validate({"name": "endpoint", **given_options})
        taken = schema.model_dump(exclude_unset=True)
        assert set(taken) == {"name", *given_options}
        assert taken["ray_actor_options"]["num_gpus"] == 0.25
    placed = options.model_options(Serving(), Placement(num_cpus=2, replicas=3))
    assert DeploymentSchema.model_validate({"name": "m", **placed}).num_replicas == 3


def test_serves_wall_is_behind_the_endpoints() -> None:
    serving = Serving(max_ongoing_requests=10, max_queued_requests=5, retry_after="3s")
    found = options.endpoint_options(serving)
    assert found["max_ongoing_requests"] > 15
    assert found["backpressure_config"] == {"status_code": 503, "retry_after_s": 3.0}


def test_what_changes_in_running_replicas_is_no_argument() -> None:
    plain = options.without_options(Serving())
    changed = Serving(
        port=1234,
        drain="1m",
        health_check_every="1s",
        autoscaling=Autoscaling(max_replicas=4),
        routing=Routing(shares={"challenger": 0.2}),
        grpc=Grpc(enabled=True),
    )
    assert options.without_options(changed) == plain
    assert options.without_options(changed.model_copy(update={"threshold": 0.1})) != plain
    sticky = Serving(routing=Routing(shares={"challenger": 0.2}, sticky_by=("customer",)))
    assert options.without_options(sticky).routing.sticky_by == ("customer",)


def decide(replicas: int, *latencies_ms: float, target_ms: float = 100.0) -> int:
    context = SimpleNamespace(
        target_num_replicas=replicas,
        aggregated_metrics={LATENCY_METRIC: dict(enumerate(latencies_ms))},
    )
    return ByLatency(target_ms)(context)[0]


def test_replicas_follow_the_latency() -> None:
    assert decide(4, 150.0, 20.0) == 6
    assert decide(4, 1000.0) == 8
    assert decide(4, 80.0) == 4
    assert decide(4, 30.0) == 3
    assert decide(1) == 0
    assert ByLatency(100.0)(SimpleNamespace(target_num_replicas=2, aggregated_metrics=None))[0] == 1


@given(
    replicas=st.integers(0, 1000),
    latency_ms=st.floats(0, 1e9),
    target_ms=st.floats(1, 1e5),
)
def test_a_slow_answer_never_takes_a_replica_away(
    replicas: int, latency_ms: float, target_ms: float
) -> None:
    decided = decide(replicas, latency_ms, target_ms=target_ms)
    assert 0 <= decided <= 2 * replicas + 1
    assert (decided >= replicas) or latency_ms < target_ms / 2
    assert (decided <= replicas) or latency_ms > target_ms


def test_the_policy_travels_by_value() -> None:
    """Serve's controller may not have the package: the module refers to nothing of it."""
    from ray.serve.config import AutoscalingPolicy

    policy = AutoscalingPolicy(
        policy_function=options.LATENCY_POLICY, policy_kwargs={"target_ms": 50}
    )
    assert b"mlops_ray.config" not in policy.get_serialized_policy_def()
    made: Any = policy.get_policy()
    assert made(target_ms=50)(SimpleNamespace(target_num_replicas=3, aggregated_metrics={}))[0] == 2

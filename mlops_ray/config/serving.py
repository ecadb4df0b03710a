"""Declarations of serving: the endpoint, its limits, and what it keeps of what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlops_ray.config.base import Duration, Frozen, Target

Share = Annotated[float, Field(gt=0, le=1)]
Alias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Autoscaling(Frozen):
    """How many replicas Ray Serve keeps; none at all, between requests, where ``min_replicas`` is 0.

    It goes by how many requests a replica has at once, or, where ``target_latency`` is set, by the
    95th percentile of how long predictions take; ``policy`` names a function of the project's own, with
    Ray Serve's signature of an autoscaling policy.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=8, gt=0)
    target_latency: Duration | None = None
    policy: Target | None = None
    upscale_delay: Duration = Field(default="3s", validate_default=True)
    downscale_delay: Duration = Field(default="1m", validate_default=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}"
            )
        if self.policy is not None and self.target_latency is not None:
            raise ValueError("give target_latency or policy, not both")
        return self


class Placement(Frozen):
    """Resources of a deployment of its own for one alias, which the endpoint calls."""

    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    replicas: int = Field(default=1, ge=1)


class Routing(Frozen):
    """Who answers. What ``shares`` leaves over is the first alias's; deployed aliases without a share
    run in shadow.

    ``sticky_by`` are inputs: rows that agree in them are answered by the same alias as long as the
    shares stay. Without it, a request goes by its first id. Changed shares reach running replicas in
    place. ``placement`` gives an alias processes of its own, for models that need other resources.
    """

    shares: dict[Alias, Share] = Field(default_factory=dict)
    sticky_by: tuple[str, ...] = ()
    placement: dict[Alias, Placement] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError(f"the shares are {sum(self.shares.values()):g} together; 1 is all")
        return self


class Graph(Frozen):
    """What is done around the model. ``before`` are functions from feature columns to feature columns,
    ``after`` from (scores, feature columns) to scores, each applied in order; ``members`` are aliases
    whose scores are averaged, by weight, into the first alias's answer, which itself weighs 1 where
    it is not among them. ``before`` and ``after`` go around every model, members only count for the
    first.
    """

    before: tuple[Target, ...] = ()
    members: dict[Alias, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    after: tuple[Target, ...] = ()


class Batching(Frozen):
    """Requests that are there at the same time share one look-up and one call of the model.

    Nothing waits for others to come. A batch has at most ``max_rows``, and fewer where that many
    take longer than ``target``.
    """

    enabled: bool = True
    max_rows: int = Field(default=512, ge=1)
    target: Duration = Field(default="20ms", validate_default=True)


class PredictionLog(Frozen):
    """What is kept of answered requests.

    ``durability``: with ``interval`` an answer is on disk at most ``every`` later, and the time of one
    write, which is what a killed replica can lose; with ``answered`` it is on disk before the client
    has it. A write waits for models in shadow, 1 s at most, with ``answered`` 0.1 s. A share
    ``sample`` of the predictions is kept, chosen by their ids; of the others only what the monitor
    counts. Inputs and features named in ``redact`` are kept as a keyed digest: a
    feature that is made of a redacted input is not redacted unless it is named, too. What is older
    than ``keep`` is removed, by whole days. Every ``compact_every``, what replicas have written goes
    into one Delta table.
    """

    durability: Literal["interval", "answered"] = "interval"
    every: Duration = Field(default="200ms", validate_default=True)
    compact_every: Duration = Field(default="10m", validate_default=True)
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    redact: tuple[str, ...] = ()
    keep: Duration | None = None


class Security(Frozen):
    """Who may call. ``tokens`` is a file that ``mlops-ray tokens`` writes: where it is named, each
    request needs a bearer token with the scope of its route. With ``certificate`` and ``key`` (PEM
    files) the endpoint speaks TLS.
    """

    tokens: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("TLS needs both certificate and key")
        return self


class Grpc(Frozen):
    """The gRPC door; it opens when Serve first starts on a cluster."""

    enabled: bool = False
    port: int = Field(default=9000, ge=1, le=65535)


class Many(Frozen):
    """An endpoint for many models: registered models whose names match ``models`` (shell patterns)
    are loaded when they are first asked for; a replica holds the ``keep`` that were used last.
    """

    models: tuple[str, ...] = ()
    alias: Alias = "champion"
    keep: int = Field(default=16, ge=1)


class Serving(Frozen):
    """One endpoint. ``mode`` throughput uses HAProxy as ingress; it acts when Serve first starts.

    A replica takes ``max_ongoing_requests`` at once and lets ``max_queued_requests`` wait; what comes
    beyond is told to come again after ``retry_after``. ``timeout`` is how long an answer may take
    where the request does not say less. A replica that is to stop answers what it has accepted,
    ``drain`` at most.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    mode: Literal["throughput", "default"] = "throughput"
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=256, ge=0)
    max_body_bytes: int = Field(default=1_000_000, ge=1)
    max_rows: int = Field(default=1024, ge=1)
    threshold: float = Field(default=0.5, ge=0, le=1)
    timeout: Duration = Field(default="10s", validate_default=True)
    retry_after: Duration = Field(default="1s", validate_default=True)
    drain: Duration = Field(default="20s", validate_default=True)
    health_check_every: Duration = Field(default="10s", validate_default=True)
    explain: bool = True
    autoscaling: Autoscaling = Autoscaling()
    routing: Routing = Routing()
    graph: Graph = Graph()
    batching: Batching = Batching()
    log: PredictionLog = PredictionLog()
    security: Security = Security()
    grpc: Grpc = Grpc()
    many: Many = Many()

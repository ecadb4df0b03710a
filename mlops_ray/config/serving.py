"""Declarations of serving: the endpoint and its limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlops_ray.config.base import Duration, Frozen


class Autoscaling(Frozen):
    """How many replicas Ray Serve keeps."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=8, gt=0)


class Serving(Frozen):
    """One endpoint. ``mode`` throughput uses HAProxy as ingress; it acts when Serve first starts."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    mode: Literal["throughput", "default"] = "throughput"
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_body_bytes: int = Field(default=1_000_000, ge=1)
    max_rows: int = Field(default=1024, ge=1)
    threshold: float = Field(default=0.5, ge=0, le=1)
    flush_every: Duration = Field(default="2s", validate_default=True)
    autoscaling: Autoscaling = Autoscaling()

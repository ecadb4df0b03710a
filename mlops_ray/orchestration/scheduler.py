"""The loop that drives a run: what may start is started, what comes back is taken in."""

from __future__ import annotations

import heapq
import itertools
import pickle
import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlops_ray.config.workflow import Step
from mlops_ray.errors import ArtifactError, LedgerError, MlopsRayError, StepError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.records import Lease, StepRecord
from mlops_ray.orchestration import once, resolution
from mlops_ray.orchestration.deadline import GRACE_S
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.keys import StepKey, item_key
from mlops_ray.orchestration.opening import Opener
from mlops_ray.orchestration.recording import Recorder
from mlops_ray.orchestration.retries import Budget, Cause, classify, delay_s, digest_of
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.tasks import Crew, Ticket
from mlops_ray.orchestration.work import Work
from mlops_ray.orchestration.worker import Call, Job, Outcome

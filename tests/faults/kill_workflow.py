"""Kills of a driver, a step's process, the ledger's writer or a node at random moments of a workflow.

``python -m faults.kill_workflow --seeds 100`` (in tests/). Each seed is a run of forty steps in a home
of its own that loses one of them, and is started again until it is over, as a person would: where it
asks whether an effect happened, the effect's file is looked at. It must then be as if nothing had been.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import fault_workflow
from faults.fault_steps import PROCESSES

from mlops_ray.cluster.connect import prepare_environment
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import RunRecord, StepRecord
from mlops_ray.orchestration import once, ownership
from mlops_ray.orchestration.executor import Executor

VICTIMS = ("driver", "effect", "worker", "ledger", "raylet")
_EFFECTS = 11
TESTS = Path(__file__).parents[1]
_MOST_STARTS = 10
_DRIVER_S = 120.0
_SHORT_LEASE_S = 3.0
_OWNED = 20
_FAILED = 10

Values = dict[tuple[str, int], Any]


class Field:
    """A cluster of two nodes; steps that ask for ``far`` run on the second, which may be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 4, "include_dashboard": False},
        )
        self._far = self._add_far()
        import ray

        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="error")

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()

    def drive(self, folder: Path, *, lease_s: float | None = None) -> Driver:
        """Start a process that runs the workflow of a folder; return when it begins to."""
        return Driver(folder, self._cluster.address, lease_s)

    def kill(self, victim: str, driver: Driver, folder: Path, chance: random.Random) -> bool:
        """Kill one; False where there was none any more."""
        if driver.code() is not None:
            return False
        if victim == "driver":
            driver.signal(signal.SIGKILL)
            return True
        if victim == "raylet":
            self._lose_far()
            return True
        found = _writers() if victim == "ledger" else _busy(folder)
        until_s = time.monotonic() + 3
        while not found and driver.code() is None and time.monotonic() < until_s:
            time.sleep(0.01)
            found = _writers() if victim == "ledger" else _busy(folder)
        with contextlib.suppress(ProcessLookupError):
            if found:
                os.kill(chance.choice(sorted(found)), signal.SIGKILL)
                return True
        return False

    def tidy(self) -> None:
        """End the ledger's writers of homes that are done with."""
        import ray

        for found in ray.util.list_named_actors(all_namespaces=True):
            if found["name"].startswith("ledger/"):
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(found["name"], namespace=found["namespace"]))

    def check_nothing_left(self) -> None:
        """Check that no effect's process stays where its driver is gone: it would hold its CPUs."""
        import ray

        until_s = time.monotonic() + 2 * once._LINGER_S
        while time.monotonic() < until_s:
            found = ray.util.list_named_actors(all_namespaces=True)
            left = [actor["name"] for actor in found if actor["namespace"] == once.NAMESPACE]
            if not left:
                return
            time.sleep(0.2)
        raise AssertionError(f"these effects are still there: {left}")

    def _add_far(self) -> Any:
        return self._cluster.add_node(num_cpus=4, resources={"far": 1})

    def _lose_far(self) -> None:
        raylet = self._far.all_processes["raylet"][0].process.pid
        victims = [raylet, *_children(raylet)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(self._far, allow_graceful=False)
        self._far = self._add_far()


class Driver:
    """A process that runs the workflow of a folder."""

    def __init__(self, folder: Path, address: str, lease_s: float | None) -> None:
        line = [sys.executable, "-m", "faults.kill_workflow", "--drive", str(folder), address]
        environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        self._log = (folder / "driver.log").open("a")
        self._process = subprocess.Popen(
            [*line, str(lease_s or ownership.LEASE_TTL_S)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=TESTS,
            env=environment,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def code(self) -> int | None:
        return self._process.poll()

    def wait(self) -> int:
        """Return its exit code: 0, 10 where the run failed, 20 where another driver has it."""
        try:
            return self._process.wait(_DRIVER_S)
        except subprocess.TimeoutExpired as error:
            raise AssertionError("the driver hangs") from error
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()


def _drive(folder: Path, address: str, lease_s: float) -> None:
    import ray

    ownership.LEASE_TTL_S, ownership._RENEW_EVERY_S = lease_s, lease_s / 4
    path = f"{TESTS}{os.pathsep}{TESTS.parent}"
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    executor = Executor(fault_workflow.spec_of(folder))
    print("ready", flush=True)
    try:
        executor.run()
    except MlopsRayError as error:
        print(error, file=sys.stderr)
        os._exit(_OWNED if "being run already" in str(error) else _FAILED)
    ray.shutdown()


def _children(pid: int) -> list[int]:
    """Return the processes below one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    for child in [child for child, parent in parents.items() if parent == pid]:
        found += [child, *_children(child)]
    return found


def _writers() -> list[int]:
    """Return the processes of the ledger's writers on this machine's cluster."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if line.read_bytes().startswith(b"ray::Writer"):
                found.append(int(line.parent.name))
    return found


def _busy(folder: Path) -> list[int]:
    """Return the processes that are in a step at the moment."""
    marks = (folder / "marks" / PROCESSES).glob("*")
    return [int(mark.name) for mark in marks if Path(f"/proc/{mark.name}").exists()]


def begin(folder: Path) -> Path:
    (folder / "marks" / PROCESSES).mkdir(parents=True)
    return folder


def progress(folder: Path) -> int:
    """Return how many events a run has recorded: the clock by which the killer goes.

    Time would not do: the same run takes three times as long on a busy machine.
    """
    with contextlib.closing(sqlite3.connect(folder / "home" / "ledger.db")) as ledger:
        try:
            (count,) = ledger.execute("select count(*) from events").fetchone()
        except sqlite3.OperationalError:
            return 0
    return int(count)


def await_moment(driver: Driver, folder: Path, moment: int) -> bool:
    """Return when a run has recorded so many events; False where it is over before."""
    while driver.code() is None:
        if progress(folder) >= moment:
            return True
        time.sleep(0.01)
    return False


def undisturbed(field: Field, folder: Path) -> tuple[dict[str, str], Values, int]:
    """Return the oracle: digests, values of the outputs, and how many events a run records."""
    driver = field.drive(begin(folder))
    code = driver.wait()
    assert code == 0, (folder / "driver.log").read_text()
    oracle = fault_workflow.outputs(folder)
    fault_workflow.check(folder, oracle)
    artifacts = open_artifacts(fault_workflow.home_of(folder))
    with _ledger(folder) as (ledger, run):
        values = {
            (record.name, record.item): artifacts.get(record.output)
            for record in _records(ledger, run)
            if record.output is not None and record.output.kind == "json"
        }
    field.tidy()
    return oracle, values, progress(folder)


def disturbed(
    field: Field, folder: Path, seed: int, victim: str, length: int, values: Values
) -> Counter[str]:
    """Run a workflow that loses something, and start it again until it is over; say what happened."""
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    driver = field.drive(begin(folder))
    if victim == "effect":
        seen["killed"] = int(kill_after_effect(driver, folder, chance.randrange(_EFFECTS)))
    elif await_moment(driver, folder, chance.randrange(length)):
        time.sleep(chance.uniform(0, 0.05))
        seen["killed"] = int(field.kill(victim, driver, folder, chance))
    while (code := driver.wait()) != 0:
        seen["starts"] += 1
        assert code in (_FAILED, -signal.SIGKILL), code
        assert seen["starts"] < _MOST_STARTS, (folder / "driver.log").read_text()
        seen["resolved"] += settle(folder, values)
        driver = field.drive(folder)
    field.tidy()
    return seen


def kill_after_effect(driver: Driver, folder: Path, number: int) -> bool:
    """Kill the process of an effect that has just happened and is not recorded yet, if one can."""
    while driver.code() is None:
        happened = fault_workflow.effects(folder)
        if len(happened) > number:
            process = happened[number][1]
            if (folder / "marks" / PROCESSES / str(process)).exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    return True
            return False
        time.sleep(0.002)
    return False


def settle(folder: Path, values: Values) -> int:
    """Say of each uncertain effect whether it happened, by what it left; return how many there were."""
    happened = fault_workflow.happened(folder)
    names = fault_workflow.effect_names(folder)
    with _ledger(folder) as (ledger, run):
        found = _records(ledger, run) if run is not None else []
    uncertain = [record for record in found if record.status == "uncertain"]
    calls = {record.name for record in uncertain if record.item >= 0}
    for record in uncertain:
        which = [record.name]
        name = names[record.name]
        if record.item >= 0:
            which += ["--item", str(record.item)]
            name = f"{name}[{record.item}]"
        elif record.name in calls:
            continue
        said = ["--rerun"]
        if happened[name]:
            said = ["--done", "--output", json.dumps(values[record.name, record.item])]
        line = [sys.executable, "-m", "mlops_ray", "resolve", record.run_id, *which, *said]
        home = {"MLOPS_RAY_HOME": str(fault_workflow.home_of(folder).root)}
        subprocess.run(line, check=True, env=os.environ | home, stdout=subprocess.DEVNULL)
    return len(uncertain)


def two_at_once(field: Field, folder: Path, oracle: dict[str, str]) -> None:
    """Start two drivers together; exactly one must run the workflow."""
    drivers = [field.drive(begin(folder)), field.drive(folder)]
    codes = sorted(driver.wait() for driver in drivers)
    assert codes == [0, _OWNED], codes
    fault_workflow.check(folder, oracle)
    field.tidy()


def paused(field: Field, folder: Path, oracle: dict[str, str], length: int) -> None:
    """Stop a driver for longer than its lease; what it does when it wakes up must leave no trace."""
    sleeper = field.drive(begin(folder), lease_s=_SHORT_LEASE_S)
    assert await_moment(sleeper, folder, length // 3)
    sleeper.signal(signal.SIGSTOP)
    time.sleep(_SHORT_LEASE_S + 0.5)
    assert field.drive(folder).wait() == 0, (folder / "driver.log").read_text()
    before = _everything(folder)
    sleeper.signal(signal.SIGCONT)
    assert sleeper.wait() not in (0, -signal.SIGKILL)
    assert _everything(folder) == before
    fault_workflow.check(folder, oracle)
    field.tidy()


def _everything(folder: Path) -> list[Any]:
    with _ledger(folder) as (ledger, run):
        return [run, _records(ledger, run), ledger.events()]


@contextlib.contextmanager
def _ledger(folder: Path) -> Iterator[tuple[Ledger, RunRecord]]:
    ledger = Ledger(fault_workflow.home_of(folder).ledger_url)
    try:
        runs = ledger.runs()
        assert len(runs) <= 1, runs
        yield ledger, runs[0] if runs else None  # type: ignore[misc]
    finally:
        ledger.close()


def _records(ledger: Ledger, run: RunRecord) -> list[StepRecord]:
    records = ledger.steps(run.run_id)
    return records + [
        call for name in ("squares", "bills") for call in ledger.items(run.run_id, name)
    ]


@contextlib.contextmanager
def field() -> Iterator[Field]:
    """Start a cluster with a temporary folder and a token of its own."""
    prepare_environment()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A lost node is noticed within about two seconds.
    os.environ |= {
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }
    with tempfile.TemporaryDirectory(prefix="rt", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        made = Field()
        try:
            yield made
        finally:
            made.close()


def run(folder: Path, seeds: int, *, first: int = 0, victims: tuple[str, ...] = VICTIMS) -> str:
    """Run the seeds, each with the next victim; return a summary.

    Raises:
        AssertionError: A run that was disturbed is not like the undisturbed one.
    """
    total: Counter[str] = Counter()
    with field() as ground:
        oracle, values, length = undisturbed(ground, folder / "oracle")
        two_at_once(ground, folder / "two", oracle)
        paused(ground, folder / "paused", oracle, length)
        for seed in range(first, first + seeds):
            victim = victims[seed % len(victims)]
            began_s = time.monotonic()
            here = folder / f"seed{seed}"
            seen = disturbed(ground, here, seed, victim, length, values)
            fault_workflow.check(here, oracle)
            total += seen
            total[f"{victim}s" if seen["killed"] else "too late"] += 1
            line = {"seed": seed, "victim": victim, **seen}
            print(json.dumps(line | {"s": round(time.monotonic() - began_s, 1)}), file=sys.stderr)
            shutil.rmtree(here)
        ground.check_nothing_left()
    return f"{seeds} seeds, two at once, one paused: {dict(total)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--victim", choices=VICTIMS)
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        prepare_environment()
        _drive(Path(given.drive[0]), given.drive[1], float(given.drive[2]))
        return
    victims = (given.victim,) if given.victim else VICTIMS
    folder = Path(tempfile.mkdtemp(prefix="kill_workflow-"))
    # What went wrong is left to look at.
    print(run(folder, given.seeds, first=given.first, victims=victims))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Dagster at the work of the orchestration benchmark; runs in Dagster's environment.

Started with a folder and an executor: ``in_process`` or ``multiprocess``. Each line of stdin is a
request, answered with seconds: ["chain", steps], ["fanout", calls]. The instance keeps its runs and
events in SQLite; outputs are files of the persisting input/output manager.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dagster import (
    DagsterInstance,
    DynamicOut,
    DynamicOutput,
    FilesystemIOManager,
    JobDefinition,
    execute_job,
    graph,
    in_process_executor,
    multiprocess_executor,
    op,
    reconstructable,
)


@op(config_schema={"start": int})
def first(context) -> int:
    return int(context.op_config["start"]) + 1


@op
def add_one(value: int) -> int:
    return value + 1


@op(config_schema={"start": int, "count": int}, out=DynamicOut(int))
def numbers(context) -> Iterator[Any]:
    start = context.op_config["start"]
    for value in range(start, start + context.op_config["count"]):
        yield DynamicOutput(value, mapping_key=f"n{value}")


@op
def total(values: list[int]) -> int:
    return sum(values)


def chain(executor: str, count: int) -> JobDefinition:
    @graph(name=f"chain_{count}")
    def steps() -> Any:
        value = first()
        for _ in range(count - 1):
            value = add_one(value)
        return value

    return _job(steps, executor)


def fanout(executor: str, count: int) -> JobDefinition:
    @graph(name="fanout")
    def steps() -> Any:
        return total(numbers().map(add_one).collect())

    return _job(steps, executor)


def chain_of_20() -> JobDefinition:
    return chain("multiprocess", 20)


def fanout_of_any() -> JobDefinition:
    return fanout("multiprocess", 0)


# Its child processes make a job again from the name of a function.
_IN_CHILDREN = {"chain": chain_of_20, "fanout": fanout_of_any}


def _job(steps: Any, executor: str) -> JobDefinition:
    made: JobDefinition = steps.to_job(
        resource_defs={"io_manager": FilesystemIOManager()},
        executor_def=in_process_executor if executor == "in_process" else multiprocess_executor,
    )
    return made


def run(instance: DagsterInstance, executor: str, what: str, count: int, start: int) -> float:
    ops: dict[str, Any] = {"first": {"config": {"start": start}}}
    if what == "fanout":
        ops = {"numbers": {"config": {"start": start, "count": count}}}
    settings = {"ops": ops, "loggers": {"console": {"config": {"log_level": "ERROR"}}}}
    if executor == "in_process":
        job = chain(executor, count) if what == "chain" else fanout(executor, count)
        began = time.perf_counter()
        done: Any = job.execute_in_process(run_config=settings, instance=instance)
    else:
        assert what != "chain" or count == 20
        began = time.perf_counter()
        job_again = reconstructable(_IN_CHILDREN[what])
        done = execute_job(job_again, instance, run_config=settings)
    seconds = time.perf_counter() - began
    assert done.success
    last = "total" if what == "fanout" else f"add_one_{count - 1}" if count > 2 else "add_one"
    if executor == "in_process":
        made = done.output_for_node(last)
        wanted = sum(range(start + 1, start + count + 1)) if what == "fanout" else start + count
        assert made == wanted, (what, made, wanted)
    return seconds


def main() -> None:
    folder, executor = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"DAGSTER_HOME": str(folder), "DAGSTER_DISABLE_TELEMETRY": "1"}
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    logging.disable(logging.INFO)
    with DagsterInstance.get() as instance:
        for start, line in enumerate(sys.stdin):
            what, count = json.loads(line)
            print("answer", run(instance, executor, what, count, start), flush=True)


if __name__ == "__main__":
    main()

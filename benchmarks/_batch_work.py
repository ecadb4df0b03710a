"""One run of the batch scoring benchmark in a process of its own.

python -m benchmarks._batch_work prepare FOLDER ROWS | ours FOLDER CORES [COPIES] | peer FOLDER THREADS
    | peers FOLDER CORES | compare FOLDER CORES
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILES = 8
FACTS = [f"fact_{number}" for number in range(8)]
REGIONS = [f"region-{number:02d}" for number in range(50)]
THRESHOLD = 0.5
BATCH_ROWS = 16_384
BLOCK_ROWS = 4096
GROUP_BATCHES = 8


def facts(inputs: dict[str, Any]) -> dict[str, Any]:
    """The features of a row are what it brings."""
    return {name: inputs[name] for name in [*FACTS, "region"]}


def declare() -> Any:
    from mlops_ray.config.features import Features

    inputs = {name: {"dtype": "float", "nullable": name == "fact_7"} for name in FACTS}
    return Features.model_validate(
        {
            "sources": {"rows": {"path": "rows.parquet", "available_at": "at"}},
            "entities": {},
            "views": {},
            "services": {
                "scored": {
                    "views": [],
                    "inputs": inputs
                    | {"region": {"dtype": "string"}, "at": {"dtype": "timestamp"}},
                    "time": "at",
                    "on_demand": ["facts"],
                }
            },
            "on_demand": {
                "facts": {
                    "function": "benchmarks._batch_work.facts",
                    "numeric": FACTS,
                    "categorical": ["region"],
                }
            },
            "labels": dict.fromkeys(("id", "time", "label", "known_at"), "at") | {"source": "rows"},
        }
    )


def prepare(folder: Path, rows: int) -> None:
    """Write the rows, file by file as another system would, and a package with a fixed model."""
    (folder / "rows").mkdir()
    for number in range(FILES):
        table = generate(number, rows // FILES)
        pq.write_table(table, folder / "rows" / f"{number}.parquet", row_group_size=1 << 20)
    write_package(folder / "package", generate(FILES, 20_000))


def generate(seed: int, rows: int) -> pa.Table:
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "id": pa.array(np.arange(rows) + seed * rows),
        "at": pa.array(np.sort(random.integers(0, 10**15, rows))).cast(pa.timestamp("us", "UTC")),
    }
    columns |= {name: pa.array(random.normal(10, 5, rows)) for name in FACTS[:-1]}
    columns["fact_7"] = pa.array(random.normal(0, 1, rows), mask=random.random(rows) < 0.05)
    columns["region"] = pa.array(REGIONS).take(pa.array(random.integers(0, len(REGIONS), rows)))
    return pa.table(columns)


def write_package(folder: Path, sample: pa.Table) -> None:
    import torch

    from mlops_ray.config.training import Model
    from mlops_ray.metadata import package
    from mlops_ray.metadata.profile import Reference
    from mlops_ray.training.encoder import Encoder
    from mlops_ray.training.loop import build

    numeric = {name: sample[name].to_numpy() for name in FACTS}
    regions = {"region": np.array(sample["region"].to_pylist(), object)}
    encoder = Encoder.fit(numeric, regions)
    torch.manual_seed(0)
    model = Model.model_validate(
        {
            "_target_": "mlops_ray.training.models.TabularNet",
            "num_numeric": encoder.spec.num_numeric,
            "cardinalities": list(encoder.spec.cardinalities),
        }
    )
    weights = {name: tensor.numpy() for name, tensor in build(model).state_dict().items()}
    service = declare().services["scored"]
    manifest = package.Manifest(
        model=model,
        encoder=encoder.spec,
        service_name="scored",
        service=service,
        label="label",
        time="at",
    )
    package.write(folder, manifest, weights, Reference.fit(numeric | regions, 10))


def ours(folder: Path, cores: int, copies: int) -> dict[str, Any]:
    import logging

    from mlops_ray.cluster.connect import prepare_environment

    prepare_environment()
    import ray

    from mlops_ray.config.batch import BatchPredict
    from mlops_ray.config.serving import Serving
    from mlops_ray.metadata.home import Home
    from mlops_ray.metadata.types import ModelVersion
    from mlops_ray.orchestration.context import Context
    from mlops_ray.serving.batch.scoring import score_batch

    ray.init(
        num_cpus=cores,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    model = ModelVersion(name="m", version=1, package=str(folder / "package"), digest="")
    context = Context("benchmark", Home(folder / "home"))
    source = copied(folder, copies)
    batch = BatchPredict(
        model="m@1", input=source, output=folder / "ours", output_format="parquet", workers=cores
    )
    with Watched() as watched:
        began = time.perf_counter()
        result = score_batch(context, "benchmark", declare(), Serving(), model, batch)
        seconds = time.perf_counter() - began
    ray.shutdown()
    assert result.rejected == 0
    return {"seconds": seconds, "rows": result.rows, "mib": watched.peak_mib}


def copied(folder: Path, copies: int) -> Path:
    """Return a folder in which each file of rows is found so many times."""
    if copies == 1:
        return folder / "rows"
    target = folder / "copies"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for copy in range(copies):
        for file in (folder / "rows").iterdir():
            (target / f"{copy:02d}-{file.name}").hardlink_to(file)
    return target


def peers(folder: Path, cores: int) -> dict[str, Any]:
    """As many peers at once as there are cores, each with all rows and a core of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        places = sorted(os.sched_getaffinity(0))[:cores]
        seconds = [*pool.map(_peer_on, places, [folder] * cores)]
    return {"seconds": statistics.harmonic_mean(seconds) / cores}


def _peer_on(core: int, folder: Path) -> float:
    os.sched_setaffinity(0, [core])
    output = folder / f"peer-{core}.parquet"
    told = peer(folder, 1, output)
    output.unlink()
    return float(told["seconds"])


def peer(folder: Path, threads: int, output: Path | None = None) -> dict[str, Any]:
    """What one would write by hand: read, encode, predict and write a batch at a time."""
    import torch

    from mlops_ray.metadata import package
    from mlops_ray.training.loop import build

    torch.set_num_threads(threads)
    pa.set_cpu_count(threads)
    read = package.read(folder / "package")
    spec = read.manifest.encoder
    module = build(read.manifest.model)
    module.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in read.weights.items()})
    frozen = torch.jit.freeze(torch.jit.script(module.eval()))
    means, stds = (np.asarray(v)[:, None] for v in (spec.means, spec.stds))
    regions = pa.array(spec.vocabularies[0], pa.string())
    for _ in range(3):
        frozen(torch.zeros(BATCH_ROWS, 9), torch.zeros(BATCH_ROWS, 1, dtype=torch.int64))

    def score(batch: pa.RecordBatch) -> Any:
        import pyarrow.compute as pc

        numbers = np.array([batch[name].to_numpy(zero_copy_only=False) for name in FACTS])
        numbers -= means
        numbers /= stds
        missing = np.isnan(numbers[7])
        np.clip(numbers, -spec.clip, spec.clip, out=numbers)
        inputs = np.empty((batch.num_rows, len(FACTS) + 1), np.float32)
        inputs[:, :8] = numbers.T
        inputs[missing, 7] = 0.0
        inputs[:, 8] = missing
        codes = pc.fill_null(pc.add(pc.index_in(batch["region"], value_set=regions), 1), 0)
        x_num, x_cat = torch.from_numpy(inputs), torch.from_numpy(np.array(codes)[:, None])
        with torch.inference_mode():
            # Activations of a few thousand rows stay in a core's cache.
            blocks = zip(x_num.split(BLOCK_ROWS), x_cat.split(BLOCK_ROWS), strict=True)
            logits = torch.cat([frozen(*block) for block in blocks])
            return torch.sigmoid(logits.double()).numpy()

    output = output or folder / "peer.parquet"
    began = time.perf_counter()
    writer, held = None, []
    for batch in batches(folder / "rows", threads > 1):
        scores = score(batch)
        added = {
            "score": scores,
            "predicted_label": (scores >= THRESHOLD).astype(np.int8),
            "model_version": np.full(len(scores), 1),
        }
        table = pa.table({n: batch[n] for n in batch.schema.names} | added)
        if writer is None:
            writer = pq.ParquetWriter(output, table.schema, use_dictionary=["region"])
        held.append(table)
        if len(held) == GROUP_BATCHES:
            writer.write_table(pa.concat_tables(held))
            held = []
    assert writer is not None
    if held:
        writer.write_table(pa.concat_tables(held))
    writer.close()
    return {"seconds": time.perf_counter() - began}


def batches(folder: Path, threads: bool) -> Iterator[pa.RecordBatch]:
    for file in sorted(folder.iterdir()):
        with pq.ParquetFile(file) as opened:
            yield from opened.iter_batches(BATCH_ROWS, use_threads=threads)


def compare(folder: Path) -> dict[str, Any]:
    """Check that both wrote the same rows, with scores equal up to the order of sums."""
    import duckdb

    mine, theirs = (
        f"read_parquet('{folder}/{name}')" for name in ("ours/*.parquet", "peer.parquet")
    )
    columns = ["id", "at", *FACTS, "region", "predicted_label", "model_version"]
    same = ", ".join(f'"{name}"' for name in columns)
    (rows, other, apart) = duckdb.sql(
        f"""select (select count(*) from {mine}), (select count(*) from
        (select {same} from {mine} except all select {same} from {theirs})),
        (select max(abs(a.score - b.score)) from {mine} a join {theirs} b using (id))"""
    ).fetchall()[0]
    # A label may differ where a score lies on the threshold, to the last bit.
    assert rows == pq.read_metadata(folder / "peer.parquet").num_rows
    assert other <= rows * 1e-6, f"{other} rows differ"
    assert apart < 1e-6, apart
    return {"rows": rows}


class Watched:
    """Looks at the memory of this process and its children, shared pages counted once."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        # A look takes some 70 ms of a core.
        while not self._over.wait(1.0):
            self.peak_mib = max(self.peak_mib, sum(map(pss_mib, tree(os.getpid()))))


def tree(root: int) -> list[int]:
    found = [root]
    for process in found:
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def pss_mib(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> None:
    what, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    copies = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    told: dict[str, Any] = {}
    if what == "prepare":
        prepare(folder, number)
    elif what == "compare":
        told = compare(folder)
    elif what == "peers":
        told = peers(folder, number)
    else:
        # Whatever a library starts, it has these cores and no others.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])
        told = ours(folder, number, copies) if what == "ours" else peer(folder, number)
    print(json.dumps(told))


if __name__ == "__main__":
    main()

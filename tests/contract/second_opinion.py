"""The as-of join once more, as a window function in DuckDB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa


def join(
    labels: pa.Table,
    rows: pa.Table,
    keys: Sequence[str],
    names: Sequence[str],
    ttl: int | None,
    known_only: bool,
) -> list[dict[str, Any]]:
    """One dict of features for each label, in the order of ``number``; timestamps in µs.

    ``rows`` stand in the order in which they were written.
    """
    by_key = " and ".join(f"l.{key} = r.{key}" for key in keys)
    conditions = [by_key, "r.event <= l.moment"]
    conditions += [f"l.moment - r.event <= {ttl}"] if ttl is not None else []
    conditions += ["r.created <= l.moment"] if known_only else []
    plain = rows
    for name in rows.column_names:
        if pa.types.is_timestamp(rows[name].type):
            at = rows.column_names.index(name)
            plain = plain.set_column(at, name, rows[name].cast(pa.int64()))
    renamed = {"event_time": "event", "created_time": "created"}
    plain = plain.rename_columns([renamed.get(name, name) for name in plain.column_names])
    plain = plain.append_column("place", pa.array(range(plain.num_rows), pa.int64()))
    asked = labels.append_column("moment", labels["at"].cast(pa.int64()))
    query = f"""
        with matching as (
            select l.number, {", ".join(f"r.{name}" for name in names)},
                row_number() over (
                    partition by l.number order by r.event desc, r.created desc, r.place desc
                ) as rank
            from asked l join plain r on {" and ".join(conditions)}
        )
        select {", ".join(f"m.{name}" for name in names)}
        from asked a left join (select * from matching where rank = 1) m using (number)
        order by a.number
    """
    with duckdb.connect() as connection:
        connection.register("asked", asked)
        connection.register("plain", plain)
        found: list[dict[str, Any]] = connection.sql(query).to_arrow_table().to_pylist()
    return found

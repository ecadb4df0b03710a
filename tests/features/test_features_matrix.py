from __future__ import annotations

import pickle

import numpy as np
import pytest

from mlops_ray.features.matrix import FeatureMatrix, by_column, join, take

NAMES = ("a", "b", "c")


def matrix(rows: int, seed: int = 0) -> FeatureMatrix:
    random = np.random.default_rng(seed)
    words = np.array([f"w{n}" for n in range(rows)], object)
    return FeatureMatrix(NAMES, random.normal(size=(rows, 3)), {"word": words})


def plain(columns: FeatureMatrix) -> dict[str, list[object]]:
    return {name: values.tolist() for name, values in columns.items()}


def test_it_is_a_mapping_with_the_numeric_columns_first() -> None:
    columns = matrix(4)
    assert list(columns) == [*NAMES, "word"]
    assert len(columns) == 4
    assert columns["b"].tolist() == columns.matrix[:, 1].tolist()
    assert {"word", "a"} <= columns.keys()
    assert "d" not in columns
    with pytest.raises(KeyError, match="d"):
        columns["d"]


@pytest.mark.parametrize(
    "rows", [slice(1, 3), np.array([3, 0, 0]), np.array([True, False, True, False])]
)
def test_rows_are_taken_of_any_columns(rows: object) -> None:
    columns = matrix(4)
    wanted = {name: values[rows].tolist() for name, values in columns.items()}
    assert plain(take(columns, rows)) == wanted
    assert plain(take(dict(columns), rows)) == wanted


def test_parts_are_joined_whatever_holds_them() -> None:
    parts = [matrix(2, 1), matrix(3, 2), matrix(1, 3)]
    wanted = {name: [v for part in parts for v in part[name].tolist()] for name in parts[0]}
    together = join(parts)
    assert isinstance(together, FeatureMatrix)
    assert plain(together) == wanted
    assert plain(join([parts[0], *map(dict, parts[1:])])) == wanted
    assert plain(join([dict(part) for part in parts])) == wanted
    assert join(parts[:1]) is parts[0]
    turned = FeatureMatrix(NAMES[::-1], parts[1].matrix[:, ::-1], parts[1].others)
    assert plain(join([parts[0], turned, parts[2]])) == wanted


def test_columns_come_to_lie_in_one_piece() -> None:
    columns = by_column(matrix(5))
    assert all(columns[name].flags.c_contiguous for name in NAMES)
    assert plain(columns) == plain(matrix(5))
    unchanged = dict(columns)
    assert by_column(unchanged) is unchanged


def test_it_can_be_sent_to_another_process() -> None:
    columns = matrix(3)
    assert plain(pickle.loads(pickle.dumps(columns))) == plain(columns)

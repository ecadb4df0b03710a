"""A view's generation follows the code that makes its rows, and a new one replaces all rows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.config.features import Features
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.sources import clean_table

FACTOR = "FACTOR = {factor}\n"
CLEAN = """
import pyarrow.compute as pc
from priced.factor import FACTOR


def clean(table):{comment}
    at = table.column_names.index("price")
    return table.set_column(at, "price", pc.multiply(table["price"], FACTOR))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the package ``priced`` and forget what was imported of it."""
    folder = tmp_path / "project" / "priced"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))

    def write(factor: float, comment: str = "") -> None:
        (folder / "factor.py").write_text(FACTOR.format(factor=factor))
        (folder / "cleaning.py").write_text(CLEAN.format(comment=comment))
        for name in [name for name in sys.modules if name.partition(".")[0] == "priced"]:
            del sys.modules[name]

    write(1.0)
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "priced"]:
        del sys.modules[name]


@pytest.fixture
def cleaned(shop: SimpleNamespace) -> Features:
    content = shop.features.model_dump(mode="json", exclude_unset=True)
    content["sources"]["prices"]["clean"] = "priced.cleaning.clean"
    content["views"]["price_again"] = {
        "entity": "shelf",
        "view": "price",
        "columns": {"price": "float"},
    }
    return Features.model_validate(content)


def test_it_follows_imports_and_not_comments(project: Any, cleaned: Features) -> None:
    first = code_digest_of(cleaned, "price")
    assert first
    assert code_digest_of(cleaned, "price_again") == first
    assert code_digest_of(cleaned, "shop_visits") == ""
    project(1.0, comment="  # the same all the same")
    assert code_digest_of(cleaned, "price") == first
    project(2.0)
    assert code_digest_of(cleaned, "price") != first


def test_new_code_replaces_all_rows(
    project: Any, cleaned: Features, shop: SimpleNamespace, tmp_path: Path
) -> None:
    offline = OfflineStore(tmp_path / "offline", cleaned)
    online = open_online(cleaned, tmp_path / "online", "shop")

    def run(hour: float, **options: Any) -> None:
        source = cleaned.sources["prices"]
        tables = shop.tables | {"prices": clean_table(source, shop.tables["prices"]).read_all()}
        pipeline = FeaturePipeline(cleaned, tables, offline, online, **options)
        # Not committed explicitly: rows of a new making must be, before anything sees them.
        pipeline.advance(shop.hour(hour), commit=hour != 70)

    def prices() -> dict[str, list[float]]:
        return {
            view: sorted(offline.read(view)["price"].to_pylist())
            for view in ("price", "price_again")
        }

    run(60)
    before, version = prices(), offline.version("price")
    project(2.0)
    run(70)
    after = prices()
    assert len(after["price"]) > len(before["price"]) > 50
    doubled = [2 * price for price in before["price"]]
    assert set(doubled) <= set(after["price"])
    assert after["price"] == after["price_again"]
    assert sorted(offline.read("price", version)["price"].to_pylist()) == before["price"]
    compare(cleaned, offline, online)
    project(3.0)
    run(70, spread_rows=10)
    expected = [1.5 * price for price in after["price"]]
    assert prices()["price"] == pytest.approx(expected)
    assert prices()["price"] == prices()["price_again"]
    compare(cleaned, offline, online)


def compare(features: Features, offline: OfflineStore, online: Any) -> None:
    """Online lies the newest row of each shelf."""
    order = [("event_time", "ascending"), ("created_time", "ascending")]
    newest = {
        (row["shop"], row["shelf"]): row for row in offline.read("price").sort_by(order).to_pylist()
    }
    shops = np.array([shop for shop, _ in newest], object)
    shelves = np.array([shelf for _, shelf in newest])
    now = pa.array([max(r["created_time"], r["event_time"]) for r in newest.values()])
    for view in ("price", "price_again"):
        matrix, _ = online.read_matrix(view, [shops, shelves], now.cast(pa.int64()).to_numpy())
        np.testing.assert_array_equal(matrix[:, 0], [row["price"] for row in newest.values()])

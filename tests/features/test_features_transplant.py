"""A training set's versions in another store: the same rows, nothing newer, no copies of files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from features.test_features_reproduction import advance, store, versions_of

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.manifest import TrainingManifest
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.reproduction import digest_table, make_training_set, training_set_of
from mlops_ray.features.transplant import transplant

__all__ = ["store"]
pytestmark = pytest.mark.usefixtures("shop_project")


@pytest.fixture
def manifest(store: OfflineStore, shop: SimpleNamespace) -> TrainingManifest:
    versions = versions_of(store, shop)
    visits = shop.tables["visits"]
    made = make_training_set(shop.features, "buys", visits, store, versions, None, on_ray=False)
    return made.manifest


def test_the_training_set_comes_out_of_the_new_store_when_the_old_one_has_moved_on(
    store: OfflineStore, shop: SimpleNamespace, manifest: TrainingManifest, tmp_path: Path
) -> None:
    for hour in range(60, 84, 12):
        advance(store, shop, hour)
    for view in manifest.views:
        store.compact(view)
    root = tmp_path / "clean"
    assert transplant(manifest, store.root, root) == {
        v: p.version for v, p in manifest.views.items()
    }
    clean = OfflineStore(root, shop.features)
    shutil.rmtree(store.root)
    for view, pin in manifest.views.items():
        assert clean.version(view) == pin.version
        assert clean.table_id(view) == pin.table
    again = training_set_of(manifest, shop.features, shop.tables["visits"], clean, on_ray=False)
    assert digest_table(again) == manifest.result


def test_files_are_links_and_the_new_store_can_be_written(
    store: OfflineStore, shop: SimpleNamespace, manifest: TrainingManifest, tmp_path: Path
) -> None:
    view = next(iter(manifest.views))
    before = digest_table(store.read(view))
    transplant(manifest, store.root, tmp_path / "clean")
    clean = OfflineStore(tmp_path / "clean", shop.features)
    data = list(clean.path(view).rglob("*.parquet"))
    assert data
    assert all(os.stat(file).st_nlink == 2 for file in data)
    advance(clean, shop, 60)
    assert clean.version(view) == manifest.views[view].version + 1
    assert store.version(view) == manifest.views[view].version
    assert digest_table(store.read(view)) == before


def test_a_declaration_that_has_changed_does_not_matter(
    store: OfflineStore, manifest: TrainingManifest, tmp_path: Path
) -> None:
    view = next(iter(manifest.views))
    (folder,) = (store.root / view).iterdir()
    folder.rename(folder.with_name("0" * 16))
    transplant(manifest, store.root, tmp_path / "clean")
    assert (tmp_path / "clean" / view / ("0" * 16) / "_delta_log").is_dir()


def test_a_table_that_is_gone_is_said(
    store: OfflineStore, manifest: TrainingManifest, tmp_path: Path
) -> None:
    shutil.rmtree(store.root / next(iter(manifest.views)))
    with pytest.raises(FeatureStoreError, match="is gone") as caught:
        transplant(manifest, store.root, tmp_path / "clean")
    assert "--given training_set" in caught.value.fix

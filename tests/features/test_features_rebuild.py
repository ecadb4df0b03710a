"""The online store is filled anew while a writer is at work: the writer's rows come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from features.online_samples import redis_server, settings
from features.test_features_push import Till, declare

from mlops_ray.features.code import code_digest_of
from mlops_ray.features.columns import from_us
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.online import OnlineStore, open_online

__all__ = ["redis_server"]

VIEW = "newest"


class Shop:
    """Takes in payments; another process fills its online store anew."""

    def __init__(self, till: Till) -> None:
        self.till = till
        self.online = till.online
        self._generation = code_digest_of(till.features, VIEW)

    def push(self, number: int, amount: float) -> None:
        self.till.now_us += 1000
        at = from_us(self.till.now_us - 10)
        self.till.pushed.push(
            "payments", [{"shop": "a", "till": number, "amount": amount, "at": at}]
        )

    def other(self) -> OnlineStore:
        return open_online(self.till.features, self.till.root / "online", "shop")

    def rebuild(self) -> None:
        materialize_view(self.till.offline, self.other(), VIEW, self._generation, full=True)

    def catch_up(self) -> int:
        return materialize_view(self.till.offline, self.other(), VIEW, self._generation)

    def amounts(self, count: int) -> list[float]:
        keys = [np.array(["a"] * count, object), np.arange(1, count + 1)]
        at_us = np.full(count, self.till.now_us + 1_000_000)
        found: list[float] = np.nan_to_num(
            self.online.read_matrix(VIEW, keys, at_us)[0][:, 0]
        ).tolist()
        return found


@pytest.fixture(params=["lmdb", "redis"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    features = declare(online=settings(request, request.param))
    open_online(features, tmp_path / "online", "shop").clear()
    shop = Shop(Till(tmp_path, features))
    shop.push(1, 1.0)
    shop.till.pushed.commit()
    return shop


def test_rows_that_are_committed_after_a_rebuild_are_online(shop: Shop) -> None:
    shop.push(1, 2.0)
    shop.rebuild()
    assert shop.amounts(1) == [1.0]
    shop.till.pushed.commit()
    assert shop.amounts(1) == [2.0]
    assert shop.catch_up() == 0


def test_rows_that_are_not_committed_come_back_with_the_next_advance(shop: Shop) -> None:
    shop.push(1, 2.0)
    shop.push(2, 3.0)
    shop.rebuild()
    shop.till.now_us += 1000
    shop.till.pushed.tick()
    assert shop.amounts(2) == [2.0, 3.0]
    shop.rebuild()
    shop.push(3, 4.0)
    assert shop.amounts(3) == [2.0, 3.0, 4.0]
    shop.till.pushed.commit()
    shop.rebuild()
    shop.till.pushed.commit()
    assert shop.amounts(3) == [2.0, 3.0, 4.0]


def test_a_rebuild_from_an_older_version_that_ends_late(shop: Shop) -> None:
    rows, cursor = shop.till.offline.read(VIEW), shop.online.cursor(VIEW)
    assert cursor is not None
    shop.push(2, 2.0)
    shop.till.pushed.commit()
    # What began before that commit ends now, and knows nothing of it.
    shop.other().replace(VIEW, [rows], cursor)
    shop.push(3, 3.0)
    assert shop.amounts(3) == [1.0, 2.0, 3.0]
    shop.till.pushed.commit()
    assert shop.catch_up() == 0
    assert shop.amounts(3) == [1.0, 2.0, 3.0]

"""Who answers: shares by id, and sticky keys."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.serving.endpoint.routing import Router
from mlops_ray.serving.models.loading import ModelSet
from mlops_ray.serving.models.served import ModelSpec, ServedModels

KEYS = 20_000


def models(**shares: float) -> ModelSet:
    """A champion, and challengers with these shares."""
    config = SimpleNamespace(shares=shares)
    aliases = ["champion", *shares]
    specs = [ModelSpec(alias=a, version=n, path=a) for n, a in enumerate(aliases, start=1)]
    loaded: list[Any] = [SimpleNamespace(spec=spec) for spec in specs]
    served = ServedModels.of(specs, config)  # type: ignore[arg-type]
    return ModelSet(served, loaded[0], (), tuple(loaded[1:]))


def owners(models: ModelSet, inputs: dict[str, Any], project: str = "shop") -> list[str]:
    router = Router(project, tuple(inputs))
    candidates, places = router.owners(models, inputs)
    return [candidates[place].spec.alias for place in places]


def keys(count: int = KEYS) -> dict[str, Any]:
    return {"customer": np.array([f"c{n}" for n in range(count)], object)}


def within(count: int, trials: int, share: float) -> bool:
    """Whether a binomial count lies within five standard deviations: one in two million does not."""
    return abs(count - trials * share) <= 5 * math.sqrt(trials * share * (1 - share))


@pytest.mark.parametrize("sticky", [False, True])
def test_shares_are_kept(sticky: bool) -> None:
    shares = {"canary": 0.1, "bold": 0.25}
    held = models(**shares)
    if sticky:
        found = Counter(owners(held, keys()))
    else:
        router = Router("shop")
        found = Counter(router.owner(held, f"a-{n}").spec.alias for n in range(KEYS))
    for alias, share in {"champion": 0.65, **shares}.items():
        assert within(found[alias], KEYS, share), (alias, found)


def test_champion_answers_all_without_challengers_and_none_where_they_have_all() -> None:
    assert set(owners(models(), keys(50))) == {"champion"}
    assert set(owners(models(canary=1.0), keys(5000))) == {"canary"}
    router = Router("shop")
    assert {router.owner(models(canary=1.0), f"{n}").spec.alias for n in range(5000)} == {"canary"}


@given(identifier=st.text(min_size=1, max_size=12) | st.just("\ud800"))
@settings(deadline=None)
def test_a_request_that_is_sent_again_is_answered_by_the_same_model(identifier: str) -> None:
    first, second = (Router("shop").owner(models(canary=0.5), identifier) for _ in range(2))
    assert first.spec == second.spec


def test_a_changed_share_moves_no_key_that_need_not() -> None:
    before = owners(models(canary=0.1), keys())
    after = owners(models(canary=0.2), keys())
    moved = Counter((b, a) for b, a in zip(before, after, strict=True) if b != a)
    assert set(moved) == {("champion", "canary")}
    assert within(moved["champion", "canary"], KEYS, 0.1)


def test_another_challenger_takes_keys_and_moves_no_others() -> None:
    before = owners(models(canary=0.2), keys())
    after = owners(models(canary=0.1, bold=0.1), keys())
    moved = Counter((b, a) for b, a in zip(before, after, strict=True) if b != a)
    # The champion keeps its 0.8; by weights, it gives some to the new one and gets some back.
    assert sum(moved.values()) < 0.2 * KEYS
    after = owners(models(canary=0.2, bold=0.1), keys())
    moved = Counter((b, a) for b, a in zip(before, after, strict=True) if b != a)
    assert {a for _, a in moved if a != "bold"} <= {"canary"}
    assert sum(moved.values()) < 0.15 * KEYS


@given(
    key=st.tuples(st.text(max_size=8), st.integers(-(2**63), 2**63 - 1), st.booleans()),
    others=st.lists(
        st.tuples(st.text(max_size=8), st.integers(-(2**63), 2**63 - 1), st.booleans()), max_size=5
    ),
)
@settings(deadline=None, max_examples=60)
def test_a_key_belongs_to_one_alias_whatever_request_it_comes_in(key: Any, others: Any) -> None:
    held = models(canary=0.5)

    def columns(rows: list[Any], dtype: Any) -> dict[str, Any]:
        texts, numbers, flags = zip(*rows, strict=True)
        return {
            "a": np.array(texts, object),
            "b": np.array(numbers, dtype),
            "c": np.array(flags, dtype if dtype is object else np.bool_),
        }

    alone = owners(held, columns([key], np.int64))
    among = owners(held, columns([*others, key], np.int64))
    nullable = owners(held, columns([*others, key], object))
    assert alone[0] == among[-1] == nullable[-1]


def test_keys_are_told_apart() -> None:
    held = models(canary=0.5)
    one = {"a": np.array(["1", "11", None, "x"] * 500, object), "b": np.arange(2000)}
    two = {"a": np.array(["11", "1", "", "y"] * 500, object), "b": np.arange(2000)}
    assert owners(held, one) != owners(held, two)
    assert owners(held, keys(), "shop") != owners(held, keys(), "other")


def test_a_changed_share_is_seen_at_once_by_a_router_that_knows_the_old() -> None:
    router = Router("shop", ("customer",))
    for share in (0.1, 0.9):
        held = models(canary=share)
        candidates, places = router.owners(held, keys())
        count = sum(candidates[place].spec.alias == "canary" for place in places)
        assert within(count, KEYS, share)


def test_keys_that_came_before_and_zeros_of_either_sign_stay_where_they_are() -> None:
    held, router = models(canary=0.5), Router("shop", ("a", "b"))
    zeros = {"a": np.arange(200) % 50, "b": np.array([0.0, -0.0] * 100)}
    _, first = router.owners(held, zeros)
    _, again = router.owners(held, {"a": zeros["a"], "b": -zeros["b"]})
    _, fresh = Router("shop", ("a", "b")).owners(held, {"a": zeros["a"], "b": np.zeros(200)})
    assert first == again == fresh
    assert set(first) == {0, 1}
    _, none = router.owners(models(), zeros)
    assert none == [0] * 200

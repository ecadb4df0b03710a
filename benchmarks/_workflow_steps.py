"""The steps of the orchestration benchmark: as little work as there can be."""

from __future__ import annotations


def numbers(count: int, start: int) -> list[int]:
    return list(range(start, start + count))


def add_one(value: int) -> int:
    return value + 1


def total(values: list[int]) -> int:
    return sum(values)

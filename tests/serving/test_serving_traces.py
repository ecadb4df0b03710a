"""What is left of a traceback that came as text."""

from __future__ import annotations

from mlops_ray.serving.deployment.traces import root_cause

CHAINED = """ray::Worker.run() (pid=1)
Traceback (most recent call last):
  File "a.py", line 3, in read
    raise ValueError("x")
ValueError: header too large

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 9, in load
mlops_ray.errors.ArtifactError: /models/3: this folder is no package
  why: header too large
  fix: train again

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: failed
"""


def test_own_error_is_found_with_its_fix() -> None:
    assert root_cause(CHAINED) == (
        "/models/3: this folder is no package\n  why: header too large\n  fix: train again"
    )


def test_without_one_of_ours_the_first_error_is_taken() -> None:
    assert root_cause(CHAINED.replace("mlops_ray.errors.ArtifactError", "KeyError")) == (
        "header too large"
    )


def test_text_without_an_error_stays() -> None:
    assert root_cause("  too few CPUs \n") == "too few CPUs"

"""What the code of then is asked is answered, whatever becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlops_ray.delivery.rerun import Answer, Request, rerun
from mlops_ray.errors import StepError


@pytest.mark.parametrize(
    "error", [StepError("no room", step="fit", run_id="r"), ImportError("no room")]
)
def test_there_is_an_answer_where_no_run_began(tmp_path: Path, error: Exception) -> None:
    def run(_request: Request) -> None:
        raise error

    request = Request(home=tmp_path / "home", config={}, given={}, only=("fit",))
    given = rerun(request, tmp_path / "answer.json", run)
    assert Answer.model_validate_json((tmp_path / "answer.json").read_bytes()) == given
    assert not given.succeeded
    assert "no room" in given.error
    assert given.steps == {}

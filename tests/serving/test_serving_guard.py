"""Tokens: made, kept as digests, asked for, limited and taken away."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import shop
from serving.harness import LocalShop, open_local

from mlops_ray.cli.tokens import tokens as verb
from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint import tokens
from mlops_ray.serving.endpoint.guard import Guard


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "tokens.json"


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


def refusal(guard: Guard, authorization: bytes | None, scope: str = "predict") -> RequestError:
    with pytest.raises(RequestError) as caught:
        guard.check(authorization, scope)
    return caught.value


def test_a_token_says_who_calls_and_is_kept_nowhere(path: Path) -> None:
    token = tokens.add(path, "alice")
    other = tokens.add(path, "bob", ("feedback",))
    guard = Guard(path)
    assert guard.check(bearer(token), "predict").name == "alice"
    assert guard.check(b"bearer  " + other.encode(), "feedback").name == "bob"
    assert refusal(guard, bearer(other)).status == 403
    text = path.read_text()
    assert token.rpartition("_")[2] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len({t["digest"] for t in json.loads(text)["tokens"]}) == 2


def test_what_is_no_token_is_refused(path: Path) -> None:
    token = tokens.add(path, "alice")
    identifier = token.split("_")[1]
    guard = Guard(path)
    wrong = [
        None,
        b"",
        token.encode(),
        b"Basic " + token.encode(),
        bearer(token[:-1]),
        bearer(token + "a"),
        bearer(f"mr_{identifier}_"),
        bearer(f"mr_00000000_{token.split('_', 2)[2]}"),
        bearer("ü"),
    ]
    assert {refusal(guard, given).status for given in wrong} == {401}


@given(junk=st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_bytes_get_in(junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "tokens"
    tokens.add(path, "alice")
    guard = Guard(path)
    assert refusal(guard, junk).status == 401
    assert refusal(guard, b"Bearer " + junk).status == 401


def test_a_rate_is_a_bucket_that_fills(path: Path) -> None:
    clock = Clock()
    token = bearer(tokens.add(path, "alice", rate=2, burst=3))
    guard = Guard(path, clock)
    for _ in range(3):
        guard.check(token, "predict")
    limited = refusal(guard, token)
    assert (limited.status, limited.retry_after_s) == (429, 0.5)
    clock.now_s += 0.5
    guard.check(token, "predict")
    assert refusal(guard, token).status == 429
    clock.now_s += 1000
    for _ in range(3):
        guard.check(token, "predict")
    assert refusal(guard, token).status == 429


def test_changes_are_taken_over_and_a_reload_fills_no_bucket(path: Path) -> None:
    clock = Clock()
    alice = bearer(tokens.add(path, "alice", rate=1, burst=1))
    guard = Guard(path, clock)
    guard.check(alice, "predict")
    bob = bearer(tokens.add(path, "bob"))
    assert refusal(guard, bob).status == 401
    guard.refresh()
    guard.check(bob, "predict")
    assert refusal(guard, alice).status == 429
    tokens.remove(path, "bob")
    guard.refresh()
    assert refusal(guard, bob).status == 401


def test_a_file_that_is_broken_changes_nothing_and_one_that_is_gone_closes(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = bearer(tokens.add(path, "alice"))
    guard = Guard(path)
    path.write_text("{")
    guard.refresh()
    assert "cannot be read" in caplog.text
    guard.check(token, "predict")
    path.unlink()
    guard.refresh()
    assert refusal(guard, token).status == 401
    with pytest.raises(ServingError, match="no file of tokens"):
        Guard(path)


def test_a_token_taken_away_stays_out_when_the_file_could_not_be_read_at_first(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = bearer(tokens.add(path, "alice"))
    tokens.add(path, "bob")
    guard = Guard(path)
    tokens.remove(path, "alice")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", _failing)
        for _ in range(3):
            guard.refresh()
    assert caplog.text.count("the tokens stay as they were") == 1
    guard.check(token, "predict")
    guard.refresh()
    assert refusal(guard, token).status == 401


def _failing(*_: object) -> bytes:
    raise OSError(5, "the disk does not answer")


@pytest.mark.parametrize("field", [{"digest": "no hex"}, {"digest": "00"}, {"rate": "Infinity"}])
def test_a_file_with_values_that_cannot_be_is_refused(path: Path, field: dict[str, str]) -> None:
    tokens.add(path, "alice")
    content = json.loads(path.read_text())
    content["tokens"][0] |= field
    path.write_text(json.dumps(content))
    with pytest.raises(ServingError, match="cannot be read"):
        Guard(path)


def test_without_a_file_everyone_may() -> None:
    assert Guard(None).check(None, "predict").name == ""


def test_the_verb(path: Path) -> None:
    run = CliRunner().invoke
    made = run(verb, ["add", "alice", "--scope", "explain", "--rate", "5", "--file", str(path)])
    token = made.stdout.strip()
    assert Guard(path).check(bearer(token), "explain").name == "alice"
    listed = run(verb, ["list", "--file", str(path)]).stdout
    assert "alice" in listed
    assert "5/s" in listed
    assert token.rpartition("_")[2] not in listed
    again = run(verb, ["add", "alice", "--file", str(path)])
    assert isinstance(again.exception, ServingError)
    assert run(verb, ["remove", "alice", "--file", str(path)]).exit_code == 0
    assert refusal(Guard(path), bearer(token), "explain").status == 401
    for wrong in (["--rate", "nan"], ["--rate", "inf"], ["--burst", "3"]):
        assert run(verb, ["add", "eve", *wrong, "--file", str(path)]).exit_code == 2
    assert isinstance(run(verb, ["remove", "x", "--file", str(path)]).exception, ServingError)


async def _statuses(local: LocalShop, headers: dict[str, str]) -> dict[str, int]:
    body = {"rows": [shop.ROW]}
    calls = {
        "predict": ("POST", "/v1/models/shop/predict", body),
        "infer": ("POST", "/v2/models/shop/infer", {}),
        "feedback": ("POST", "/v1/models/shop/feedback", {"labels": [{"id": "a", "label": 1}]}),
        "explain": ("POST", "/v1/models/shop/explain", body),
        "metadata": ("GET", "/v1/models/shop/metadata", b""),
        "model": ("GET", "/v2/models/shop", b""),
        "health": ("GET", "/healthz", b""),
        "ready": ("GET", "/v2/health/ready", b""),
        "openapi": ("GET", "/openapi.json", b""),
    }
    return {name: (await local.send(*call, headers))[0] for name, call in calls.items()}


def test_each_route_asks_for_its_scope(
    shop_home: Home, packages: list[Path], tmp_path: Path, path: Path
) -> None:
    import asyncio

    token = tokens.add(path, "alice", ("predict",))

    async def serve() -> None:
        serving = Serving.model_validate({"security": {"tokens": str(path)}})
        local = open_local(shop_home, packages, Home(tmp_path / "log"), serving)
        await local.endpoint.reconfigure(local.config(1))
        health = {"health": 200, "ready": 200, "openapi": 200}
        found = await _statuses(local, {})
        closed = ("predict", "infer", "feedback", "explain", "metadata", "model")
        assert found == dict.fromkeys(closed, 401) | health
        found = await _statuses(local, {"authorization": f"Bearer {token}"})
        assert found["predict"] == 200
        assert found["infer"] == 400
        refused = ("feedback", "explain", "metadata", "model")
        assert {name: found[name] for name in refused} == dict.fromkeys(refused, 403)
        _, headers, _ = await local.send("GET", "/v1/models/shop/metadata")
        assert headers["www-authenticate"] == 'Bearer realm="mlops-ray"'

    asyncio.run(serve())


def test_keeping_out_of_the_log_is_a_right_of_its_own(
    shop_home: Home, packages: list[Path], tmp_path: Path, path: Path
) -> None:
    import asyncio

    usual, probe = tokens.add(path, "usual"), tokens.add(path, "probe", tokens.SCOPES)
    label = {"labels": [{"id": "a", "label": 1}]}

    async def serve() -> None:
        serving = Serving.model_validate({"security": {"tokens": str(path)}})
        local = open_local(shop_home, packages, Home(tmp_path / "log"), serving)
        await local.endpoint.reconfigure(local.config(1))
        pending = []
        for token, quiet, wanted in (
            (usual, {"x-mlops-ray-log": "Off"}, 403),
            (probe, {"x-mlops-ray-log": "off"}, 200),
            (usual, {}, 200),
        ):
            headers = {"authorization": f"Bearer {token}"} | quiet
            for route, body in (("predict", {"rows": [shop.ROW]}), ("feedback", label)):
                called = await local.call("POST", f"/v1/models/shop/{route}", body, headers)
                assert called[0] == wanted
            pending.append(local.endpoint.log.pending_rows)
        assert pending == [0, 0, 2]

    asyncio.run(serve())
    assert "unlogged" not in tokens.read(path)[0].scopes

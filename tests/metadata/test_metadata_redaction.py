"""Redaction: no password is left in what people read, however the address is cut up."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlops_ray.errors import LedgerError, StorageError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.redaction import redacted
from mlops_ray.metadata.tracking import _without_user


@given(password=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8))
@example("SEC@RETpassword")
@example("SEC/RETpassword")
@example("a:bcd@efg/hij")
def test_no_part_of_a_password_is_left(password: str) -> None:
    url = f"postgresql://someone:{password}@host:5432/database"
    hidden = "postgresql://***@host:5432/database"
    assert redacted(url) == hidden
    assert redacted(f"cannot open {url} today") == f"cannot open {hidden} today"
    for cut in (password, password.rpartition("@")[2], password.rpartition("/")[2]):
        assert cut not in redacted(f"no host {cut!r}", url)


def test_passwords_among_options_are_hidden() -> None:
    url = "postgresql:///db?host=here&password=SECRET&port=1"
    assert redacted(url) == "postgresql:///db?host=here&password=***&port=1"
    assert redacted("s3://KEY:SECRET@bucket/a?region=x") == "s3://***@bucket/a?region=x"
    assert redacted("s3://bucket/a?secret_key=SECRET") == "s3://bucket/a?secret_key=***"
    assert redacted("http://mlflow:5000/a") == "http://mlflow:5000/a"


@pytest.mark.parametrize(
    "url",
    [
        "postgres host",
        "/plain/path.db",
        "postgresql://u:SECRET@h:abc/db",
        "mysql://u:SECRET@127.0.0.1:1/db",
        "postgresql://u:SECRET@127.0.0.1:1/db?sslmode=bogus",
        "postgresql:///db?password=SECRET&host=127.0.0.1&port=1",
    ],
)
def test_a_bad_address_of_a_ledger_is_told_without_its_password(url: str) -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger(url, patience_s=0.1)
    assert "SECRET" not in str(caught.value)
    assert caught.value.fix


def test_a_bad_address_of_a_store_is_told_without_its_secret(home: Home) -> None:
    address = "s3://KEY:SECRET@buck et/prefix?region=x"
    with pytest.raises(StorageError) as caught:
        open_artifacts(Home(home.root, Storage(artifacts=address)))
    assert "SECRET" not in str(caught.value)


def test_mlflow_gets_an_address_without_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    assert _without_user("https://me:p%40ss@mlflow:5000/a") == "https://mlflow:5000/a"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"
    assert _without_user("http://mlflow:5000") == "http://mlflow:5000"

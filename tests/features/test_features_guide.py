"""The guide's example is a declaration that the schema accepts."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mlops_ray.config.features import Features
from mlops_ray.features.definitions import define
from mlops_ray.features.service import feature_columns

GUIDE = Path(__file__).parents[2] / "docs" / "features.md"


def test_the_example_of_the_guide_can_be_declared() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    features = Features.model_validate(yaml.safe_load(blocks[0])["features"])
    assert features.view_order.index("last_order") < features.view_order.index("spending")
    assert define(features, "last_order").features["items"] == "int"
    assert features.online.on_failure == "missing"
    numeric, categorical = feature_columns(features, "buys")
    assert "clicking__kinds_7d" in numeric
    assert categorical == ("last_order__city", "weekday")

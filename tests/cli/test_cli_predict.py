"""The verb predict: what is typed is what the workflow is given."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mlops_ray.cli.predict import _quoted


@given(st.text(st.characters(codec="utf-8", exclude_characters="$\n\r\x00"), max_size=20))
def test_any_text_comes_through_hydras_grammar(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"++batch.input={_quoted(text)}")
    assert OmegaConf.create({"input": parsed.value()})["input"] == text


def test_numbers_and_switches_stay_what_they_are() -> None:
    assert (_quoted(0.2), _quoted(True), _quoted(3)) == ("0.2", "true", "3")

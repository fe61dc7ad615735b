"""Generated texts and JSON values, beside the damaged files: any value of any shape."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydml.config.trial import Machine, StudySettings, Trial
from raydml.data.catalog import DataError
from raydml.errors import ConfigError
from raydml.images.preprocessing import Resizing
from raydml.search_space.space import with_overrides
from raydml.search_space.yaml_reader import Node, read_yaml
from raydml.study.event_fields import _FIELDS
from raydml.study.events import parse_line, reduce_events
from raydml.tracking.pyfunc_model import ImagesRefused, as_image, as_items
from tests.report.written_study import _events

KNOWN = {
    "study": list(StudySettings.model_fields),
    "trial": list(Trial.model_fields),
    "machine": list(Machine.model_fields),
}
SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)
YAML_LETTERS = st.text(st.sampled_from("ab1.e-+:,[]{}&*!|>#%@\"'\\ \n\t\0é\ud800"), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", "name", "runs"]), inner, max_size=3)
    ),
    max_leaves=8,
)
SEEN = [json.loads(json.dumps({"time": 1.0, **event})) for event in _events(3)]


@SETTINGS
@given(YAML_LETTERS | st.text(max_size=30))
def test_any_text_is_yaml_or_problems_with_their_place(text):
    root, problems = read_yaml(text, "x.yaml")
    assert root is not None or problems
    assert all(problem.where.startswith("x.yaml") for problem in problems)
    _, problems = with_overrides(Node({}, ""), [f"trial.loss={text}", text], KNOWN)
    if problems:
        assert str(ConfigError(problems))


@SETTINGS
@given(st.sampled_from(sorted(_FIELDS)), st.sampled_from(SEEN), st.data())
def test_an_event_with_any_value_is_skipped_or_reduced(kind, seen, data):
    event = {**seen, "event": data.draw(st.sampled_from([seen["event"], kind]))}
    for name in data.draw(st.lists(st.sampled_from([*event, "ranking", "trials", "config"]), max_size=2)):
        event[name] = data.draw(VALUES)
    found = parse_line(json.dumps(event).encode())
    reduce_events([*SEEN[:4], *([] if found is None else [found])])


@pytest.mark.xdist_group("mlflow")
@SETTINGS
@given(VALUES)
def test_any_value_is_images_or_refused_by_a_served_model(value):
    with suppress(ImagesRefused, DataError):
        for item in as_items(value):
            as_image(item, "image", Resizing(8, "short_side", "bilinear"))

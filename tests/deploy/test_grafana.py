"""The dashboard for Grafana asks for metrics that studies report, and for each of them."""

import json
import re
from pathlib import Path

from raydml.study import gauges

BOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text(encoding="utf-8"))


def test_the_dashboard_shows_each_metric_of_a_study_once(monkeypatch, tmp_path):
    reported = {}
    monkeypatch.setattr(gauges, "Gauge", lambda name, _text, tag_keys: reported.setdefault(f"ray_{name}", tag_keys))
    gauges.StudyGauges(tmp_path)
    gauges.SlotGauges("s")
    queries = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    asked = [name for query in queries for name in re.findall(r"ray_raydml_\w+", query)]
    assert sorted(asked) == sorted(reported)
    for query in queries:
        (by,), (selected,) = re.findall(r"by \((\w+)\)", query), re.findall(r"\{(\w+)=~", query)
        name = re.search(r"ray_raydml_\w+", query)[0]
        assert {by, selected} <= set(reported[name])


def test_each_panel_has_a_place_of_its_own_and_the_source_that_the_user_chooses():
    places = [tuple(panel["gridPos"].values()) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places) == 5
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} == {"${source}"}
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["source", "study"]

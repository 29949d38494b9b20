"""docs/grafana.json: a dashboard that Grafana imports, of metrics that the server has."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit import FakeEngine
from prometheus_client import CollectorRegistry

import labs
import labs_meters

DASHBOARD = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text("utf-8"))
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture
def exported(tiny, monkeypatch):
    """Return the labels of each sample of /metrics, when everything has happened once."""
    kinds = {"allocated": 1, "reserved": 2, "free": 3, "total": 4}
    monkeypatch.setattr(labs_meters, "gpu_memory", lambda: kinds)
    meters = labs_meters.Meters(CollectorRegistry())
    meters.acted("a-rule", "input")
    meters.piece("m", 2.0, 0.0, 1.0)
    meters.piece("m", 3.0, 2.0, 1.0)
    meters.done("m", labs.Done("stop", labs.Usage(1, 2), labs.Timings(0.0, 0.0, 0.0, 0.0)), 1.0)
    status = {"m": FakeEngine(tiny).status()}
    engines = {"m": FakeEngine(tiny), "vectors": SimpleNamespace(model=object())}
    families = [*meters.registry.collect(), *labs_meters.engine_metrics(status)]
    families += labs_meters.draft_metrics(engines)
    return {each.name: {*each.labels} for family in families for each in family.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_expression_asks_for_metrics_and_labels_that_exist(exported, expression):
    names = re.findall(r"\blabs_\w+", expression)
    assert names
    assert {*names} <= {*exported}
    known = set.union(*(exported[name] for name in names))
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {*group.split(", ")} <= known
    for name, matchers in re.findall(r"\b(labs_\w+)\{([^}]*)\}", expression):
        assert {*re.findall(r"(\w+)=", matchers)} <= exported[name]
    for function in re.findall(r"(\w+)\([^()]*_total", expression):
        assert function in ("rate", "increase")  # a counter alone only grows
    assert expression.count("(") == expression.count(")")


def test_each_legend_names_a_label_of_its_expression():
    for target in (target for panel in PANELS for target in panel["targets"]):
        grouped = ", ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))
        assert {*re.findall(r"{{(\w+)}}", target["legendFormat"])} <= {*grouped.split(", ")}


def test_it_is_a_dashboard_that_grafana_11_imports():
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["title"]
    assert re.fullmatch("[a-z-]{1,40}", DASHBOARD["uid"])
    assert "id" not in DASHBOARD
    assert "__inputs" not in DASHBOARD
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    used = {name for text in EXPRESSIONS for name in re.findall(r"\$(?!__)(\w+)", text)}
    assert used | {"datasource"} == {*variables}
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert panel["title"]
        assert panel["description"]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_no_panel_lies_on_another_or_beside_the_grid():
    taken = set()
    for at in (panel["gridPos"] for panel in PANELS):
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        taken |= cells


def test_every_metric_has_a_panel_or_a_reason(exported):
    shown = {name for text in EXPRESSIONS for name in re.findall(r"\blabs_\w+", text)}
    parts = re.compile(r"_(bucket|sum|count)$")
    samples = {name for name in exported if not name.endswith("_created")}
    missing = {parts.sub("", name) for name in samples} - {parts.sub("", name) for name in shown}
    assert missing <= {"labs_steps_total"}  # tells only of the loop, not of what users see

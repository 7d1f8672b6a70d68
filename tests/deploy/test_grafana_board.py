"""The Grafana board: every query asks for metrics and labels that there are, every panel says what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.metrics import METRICS

BOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "deepseek_ray.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
WORDS = {"sum", "max", "avg", "by", "rate", "histogram_quantile", "label_values"}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
EXPORTED = {f"ray_{one.name}{suffix}": one for one in METRICS.values() for suffix in SUFFIXES[one.kind]}
SELECTED = re.compile(r"(\w+)\{([^}]*)\}")
GROUPED = re.compile(r"by \(([^)]*)\)")


def problems(query: str, legend: str = "") -> list[str]:
    """What Prometheus would answer with nothing, or with something else than is meant."""
    found = []
    labels = {"le"} if "_bucket" in query else set()
    for name, matchers in SELECTED.findall(query):
        metric = EXPORTED.get(name)
        if metric is None:
            found.append(f"no metric {name}")
            continue
        labels |= set(metric.labels)
        used = {part.split("=")[0].strip(" !~") for part in matchers.split(",")}
        found += [f"{name} has no label {label}" for label in used - set(metric.labels)]
        if (metric.kind == "gauge") == (f"rate({name}" in query):
            found.append(f"{name} is a {metric.kind}")
        if f"rate({name}" in query and f"rate({name}{{{matchers}}}[$__rate_interval]" not in query:
            found.append(f"{name} has no window")
    groups = {label.strip() for group in GROUPED.findall(query) for label in group.split(",")}
    found += [f"no label {label} to group by" for label in groups - labels]
    found += [f"no label {label} for the legend" for label in set(re.findall(r"{{(\w+)}}", legend)) - groups]
    bare = GROUPED.sub("", SELECTED.sub("", query)).replace("[$__rate_interval]", "")
    return found + [f"unknown word {word}" for word in re.findall(r"[a-z_]\w*", bare) if word not in WORDS]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_asks_for_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        assert problems(target["expr"], target["legendFormat"]) == []
        assert 'model_name=~"$model"' in target["expr"]
    assert panel["title"] and panel["description"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_units_are_those_of_the_metrics(panel: dict[str, Any]) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        query, names = target["expr"], [name for name, _ in SELECTED.findall(target["expr"])]
        metric = EXPORTED[names[0]]
        if len(names) == 2:  # a ratio
            assert unit == "suffix: x"
        elif metric.unit == "seconds":  # a quantile, or seconds per second
            assert unit == ("s" if query.startswith("histogram_quantile") else "percentunit")
        elif metric.kind == "counter":
            assert unit in (f"suffix: {metric.unit}/s", {"requests": "reqps"}.get(metric.unit))
        else:
            known = {"fraction": "percentunit", "ratio": "suffix: x", "0 or 1": "none", "epoch": "none"}
            assert unit == known.get(metric.unit, f"suffix: {metric.unit}")


def test_the_board_shows_every_kind_of_process() -> None:
    shown = {
        EXPORTED[name].source for panel in PANELS for t in panel["targets"] for name, _ in SELECTED.findall(t["expr"])
    }
    assert shown == {metric.source for metric in METRICS.values()}


def test_panels_do_not_cover_each_other() -> None:
    seen: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & seen, panel["title"]
        seen |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_the_variables_are_filled_from_what_there_is() -> None:
    datasource, model = BOARD["templating"]["list"]
    assert datasource["type"] == "datasource"
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", model["query"]).groups()  # type: ignore[union-attr]
    assert label in EXPORTED[name].labels
    uids = {place["datasource"]["uid"] for panel in PANELS for place in (panel, *panel["targets"])}
    assert uids == {f"${{{datasource['name']}}}"}


@pytest.mark.parametrize(
    ("query", "legend", "problem"),
    [
        ("max by (engine) (ray_vllm_gpu_cache_usage{engine='0'})", "", "no metric ray_vllm_gpu_cache_usage"),
        ("max by (engine) (ray_moe_engine_up)", "", "unknown word ray_moe_engine_up"),
        ("max by (engine) (ray_moe_engine_up{shard='0'})", "", "ray_moe_engine_up has no label shard"),
        ("max by (shard) (ray_moe_engine_up{engine='0'})", "", "no label shard to group by"),
        ("max by (engine) (ray_moe_engine_up{engine='0'})", "{{shard}}", "no label shard for the legend"),
        ("max by (engine) (rate(ray_moe_engine_up{engine='0'}[$__rate_interval]))", "", "ray_moe_engine_up is a gauge"),
        ("sum by (engine) (ray_moe_frames_total{engine='0'})", "", "ray_moe_frames_total is a counter"),
        ("sum by (engine) (rate(ray_moe_frames_total{engine='0'}))", "", "ray_moe_frames_total has no window"),
        ("sum by (le) (rate(ray_moe_combine_seconds{engine='0'}[$__rate_interval]))", "", "no metric ray_moe_combine_"),
    ],
)
def test_a_wrong_query_is_found(query: str, legend: str, problem: str) -> None:
    assert any(problem in one for one in problems(query, legend)), problems(query, legend)

"""Results of unlike machines stand beside each other; the newest of each counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results_file, tables
from benchmarks.results_file import newest, newest_by_hardware, results_path


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(results_file, "_hardware", lambda: "2cores_avx512")
    return tmp_path


def write(directory: Path, name: str, date: str) -> None:
    (directory / f"{name}.json").write_text(json.dumps({"machine": {"date": date}}))


def test_of_each_kind_of_machine_the_last_month_counts(results: Path) -> None:
    for name in ("speed_2cores_202611", "speed_2cores_202612", "speed_2cores_avx512_202610", "speeds_8cores_202611"):
        write(results, name, "2026-12-01")
    found = newest_by_hardware("speed")
    assert {hardware: result["file"] for hardware, result in found.items()} == {
        "2cores": "speed_2cores_202612.json",
        "2cores_avx512": "speed_2cores_avx512_202610.json",
    }


def test_a_machine_is_compared_with_its_like_or_with_the_last_measured(results: Path) -> None:
    write(results, "speed_2cores_202610", "2026-10-02")
    write(results, "speed_16cores_202611", "2026-11-02")
    assert newest("speed")["file"] == "speed_16cores_202611.json"
    write(results, results_path("speed").stem.rsplit("_", 1)[0] + "_202609", "2026-09-02")
    assert newest("speed")["file"] == "speed_2cores_avx512_202609.json"


def test_headings_name_the_machine_where_there_are_several(results: Path) -> None:
    write(results, "speed_2cores_202611", "2026-11-01")
    assert list(tables._sections("speed", lambda _: "## Speed\n\ntext")) == ["## Speed\n\ntext"]
    write(results, "speed_16cores_202611", "2026-11-01")
    texts = list(tables._sections("speed", lambda result: f"## Speed\n\n{result['file']}"))
    assert texts == [
        "## Speed (16cores)\n\nspeed_16cores_202611.json",
        "## Speed (2cores)\n\nspeed_2cores_202611.json",
    ]


def test_no_results_no_section(results: Path) -> None:
    assert list(tables._sections("speed", lambda _: "## Speed\n")) == []

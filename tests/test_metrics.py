"""The table of metrics: consistent, documented, and what Ray's dashboard asks for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ray import metrics
from deepseek_ray.metrics import METRICS, with_table

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python -m deepseek_ray.metrics docs/metrics.md"


def test_names_say_what_they_are() -> None:
    assert len(METRICS) == len(metrics._ALL), "a name occurs twice"
    for metric in METRICS.values():
        assert re.fullmatch(r"(vllm|moe)_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        assert ("seconds" in metric.name) == (metric.unit == "seconds"), metric.name


def test_rays_dashboard_finds_its_names() -> None:
    panels = pytest.importorskip("ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels")
    asked = set(re.findall(r"ray_(vllm_\w+)", Path(panels.__file__).read_text(encoding="utf-8")))
    suffixes = {"histogram": ("", "_sum", "_count", "_bucket"), "counter": ("",), "gauge": ("",)}
    shown = {metric.name + suffix for metric in METRICS.values() for suffix in suffixes[metric.kind]}
    absent = ("vllm_external_prefix", "vllm_nixl", "vllm_kv_offload", "vllm_num_requests_swapped")
    assert {name for name in asked - shown if not name.startswith(absent)} == set()


def test_the_table_is_plain_data() -> None:
    program = "import sys; import deepseek_ray.metrics; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0

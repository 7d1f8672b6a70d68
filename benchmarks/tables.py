"""Writes the tables of `docs/performance.md` from the newest results files.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "performance.md"
_HEAD = """# Speed

Every figure is measured on one machine in one run with interleaved rounds; only ratios within a table mean anything.
This page is written by `python -m benchmarks.tables` from `benchmarks/results/`; `make bench` measures again.
"""


def main() -> None:
    sections = [_HEAD, generation_section(newest("generation")), frames_section(newest("frame_round_trip"))]
    PAGE.write_text("\n".join(sections), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(RESULTS.parent.parent)}")


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's comments `<!-- name: begin -->` and `<!-- name: end -->`."""
    content = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = content.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(f"wrote {page.relative_to(RESULTS.parent.parent)}")


def newest(what: str) -> dict[str, Any]:
    path = max(RESULTS.glob(f"{what}_*.json"), key=lambda found: found.stem.rsplit("_", 1)[1])
    return {**json.loads(Path(path).read_text()), "file": path.name}


def generation_section(result: dict[str, Any]) -> str:
    """Tokens per second of each system, and ours as a ratio to transformers."""
    rows = {(row["system"], row["sequences"]): row for row in result["rows"]}
    lines = [
        "## Generation: `LLM` against transformers on bench-mini",
        "",
        f"{_machine(result)}, {result['threads']} threads, bfloat16, prompt 128, medians of {result['rounds']} rounds "
        f"(`{result['file']}`).",
        "",
        "| sequences | system | prefill tokens/s | decode tokens/s | decode against transformers |",
        "|---|---|---|---|---|",
    ]
    for (system, sequences), row in rows.items():
        base = rows["transformers", sequences]["decode_tokens_per_second"]
        lines.append(
            f"| {sequences} | {system} | {row['prefill_tokens_per_second']:.0f} | "
            f"{row['decode_tokens_per_second']:.1f} | {row['decode_tokens_per_second'] / base:.2f}x |"
        )
    return "\n".join([*lines, ""])


def frames_section(result: dict[str, Any]) -> str:
    micros = result["microseconds"]
    lines = [
        "## Frame round trip between two processes on one node",
        "",
        f"{_machine(result)}, {result['bytes_each_way'] // 1024} KB each way, medians of {result['runs']} runs "
        f"(`{result['file']}`). Bare is an eventfd wake-up and a memcpy.",
        "",
        "| way | microseconds | against bare |",
        "|---|---|---|",
    ]
    lines += [f"| {way} | {value:.0f} | {value / micros['bare']:.1f}x |" for way, value in micros.items()]
    return "\n".join([*lines, ""])


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']}, {machine['date']}"


if __name__ == "__main__":
    main()

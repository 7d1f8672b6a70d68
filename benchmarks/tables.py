"""Writes the tables and plots of `docs/performance.md` from the newest results files of each machine.

python -m benchmarks.tables
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, newest_by_hardware
from benchmarks.sections.generation import (
    generation_section,
    quantization_section,
    speculation_section,
    startup_section,
    step_profile_section,
    uneven_load_section,
)
from benchmarks.sections.goals import goals_section
from benchmarks.sections.gpu import gpu_decode_section, gpu_kernels_section
from benchmarks.sections.placement import placement_section
from benchmarks.sections.plots import PANELS, draw
from benchmarks.sections.serving import frames_section, http_section, long_context_section, simulation_section
from benchmarks.sections.training import strategies_section, training_section, tuning_section

PAGE = RESULTS.parent.parent / "docs" / "performance.md"
_HEAD = """# Speed

Every figure is measured on one machine in one run with interleaved rounds; only ratios within a table mean anything.
Where a question was asked on several machines, headings name them as the results' files do (`2cores_avx512`).
This page is written by `python -m benchmarks.tables` from `benchmarks/results/`; `make bench` measures again.
"""


def main() -> None:
    written = {
        "generation": generation_section,
        "uneven_load": uneven_load_section,
        "step_profile": step_profile_section,
        "startup": startup_section,
        "quantization": quantization_section,
        "speculation": speculation_section,
        "long_context": long_context_section,
        "http_load": http_section,
        "frame_round_trip": frames_section,
        "simulation": simulation_section,
        "training": training_section,
        "placement": placement_section,
        "strategies": strategies_section,
        "tuning": tuning_section,
        "gpu_decode": gpu_decode_section,
        "gpu_kernels": gpu_kernels_section,
    }
    sections = [
        _HEAD,
        goals_section(_results_by_hardware(written)),
        *(text for what, section in written.items() for text in _sections(what, section)),
    ]
    PAGE.write_text("\n".join(sections), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(RESULTS.parent.parent)}")


def _results_by_hardware(questions: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of machines that generation was measured on, which most goals are about."""
    measured = {what: newest_by_hardware(what) for what in questions}
    return {
        hardware: {what: results[hardware] for what, results in measured.items() if hardware in results}
        for hardware in measured["generation"]
    }


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's comments `<!-- name: begin -->` and `<!-- name: end -->`."""
    content = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = content.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(f"wrote {page.relative_to(RESULTS.parent.parent)}")


def _sections(what: str, section: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """One for each kind of machine that this was measured on, named in the heading where there are several."""
    measured = newest_by_hardware(what)
    for hardware, result in measured.items():
        heading, _, text = section(result).partition("\n")
        if what in PANELS:
            plot = (RESULTS / result["file"]).with_suffix(".png")
            draw(PANELS[what](result), plot)
            text += f"\n![the same as bars](../benchmarks/results/{plot.name})\n"
        yield f"{heading}{f' ({hardware})' if len(measured) > 1 else ''}\n{text}"


if __name__ == "__main__":
    main()

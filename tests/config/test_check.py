"""Every problem of a file at once, each at the line that is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.config.check import Problem, find_problems
from deepseek_ray.config.load import load_values
from deepseek_ray.config.run import PretrainConfig

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


def problems(tmp_path: Path, *overrides: str, **replaced: str) -> list[Problem]:
    """Problems of `configs/tiny.yaml` with some of its text replaced; places are lines of the file, if in it."""
    text = TINY.read_text()
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    found = find_problems(PretrainConfig, load_values(PretrainConfig, path, overrides))
    return [Problem(problem.place.removeprefix(f"{path}:"), problem.message) for problem in found]


def line_of(text: str) -> str:
    return str(next(n for n, line in enumerate(TINY.read_text().splitlines(), start=1) if text in line))


def test_a_good_file_has_none(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


def test_all_kinds_of_problems_are_told_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "distributed.timeout_s=0",
        **{
            "num_experts_per_tok: 2": "num_experts_per_tok: 5",  # against another key of its section
            "{lr: 3.0e-3}": "{lr: 3.0e-3, betas: [0.9, 1.0]}",  # a check of the section
            "steps: 40": "stpes: 40",  # an unknown key
            "source: stdlib": "source: text",  # a check of the section that pydantic collects
            "qk_rope_head_dim: 8": "qk_rope_head_dim: eight",
        },
    )
    by_place = {problem.place: problem.message for problem in found}
    assert "unknown key 'training.stpes'; did you mean 'steps'?" in by_place[line_of("steps: 40")]
    assert "optimizer.betas is [0.9, 1.0]" in by_place[line_of("optimizer:")]
    assert "data: source text needs paths" in by_place[line_of("data:")]
    assert "model.qk_rope_head_dim is 'eight'" in by_place[line_of("qk_rope_head_dim")]
    assert "timeout_s is 0" in by_place["--set distributed.timeout_s=0"]
    assert len(found) == 5


def test_a_check_of_a_section_stands_at_the_key_it_names(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, **{"num_experts_per_tok: 2": "num_experts_per_tok: 5"})
    assert problem.place == line_of("num_experts_per_tok")
    assert "num_experts_per_tok is 5" in problem.message


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("training.micro_batch_size=3", line_of("global_batch_size")),  # told by the key that has to be a multiple
        ("schedule.warmup_steps=41", "--set schedule.warmup_steps=41"),
        ("data.sequence_length=600", "--set data.sequence_length=600"),
    ],
)
def test_checks_across_sections_are_placed(tmp_path: Path, override: str, place: str) -> None:
    (problem,) = problems(tmp_path, override)
    assert problem.place == place


def test_a_missing_key_is_told_at_its_section(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, **{"  hidden_size: 64\n": ""})
    assert (problem.place, "model.hidden_size is missing" in problem.message) == (line_of("model:"), True)


def test_a_missing_section_is_told_for_the_whole_file(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, **{"name: tiny\n": ""})
    assert problem.place.endswith("run.yaml")
    assert "name is missing" in problem.message

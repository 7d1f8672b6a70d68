"""What we want of speed, and what was measured of it: one row for each goal, one column for each kind of machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.sections.generation import OWN, PEERS, best, rows_of

Results = Mapping[str, dict[str, Any]]
"""Question -> the newest results of one machine; what was not asked there is missing."""


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: float
    """At least, or with `at_most` at most."""
    figures: Callable[[Results], list[float]]
    """KeyError where it was not measured."""
    where: str = ""
    """Of a goal that is missed: where the time goes."""
    at_most: bool = False

    def is_met(self, figure: float) -> bool:
        """As it is printed: by two decimals."""
        figure = round(figure, 2)
        return figure <= self.wanted if self.at_most else figure >= self.wanted

    def cell(self, results: Results) -> str:
        """The figures, those that miss the goal in bold type; a dash where it was not measured."""
        try:
            figures = self.figures(results)
        except KeyError:
            return "-"
        return " / ".join(f"{figure:.2f}" if self.is_met(figure) else f"**{figure:.2f}**" for figure in figures)


def goals_section(by_hardware: Mapping[str, Results]) -> str:
    """`by_hardware` has what generation was measured on, whose day a column tells."""
    heads = [
        f"{hardware}, {results['generation']['machine']['date']}" if "generation" in results else hardware
        for hardware, results in by_hardware.items()
    ]
    lines = [
        "## Goals, and what was measured",
        "",
        "Ratios of medians of one run each, several where a goal is one of 1, 8 and 32 (or the first two of them, or "
        "the last two) sequences; bold where it is missed. The sections below have the figures that they are made of; "
        "the code was that of the day.",
        "",
        f"| | wanted | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(by_hardware)}",
    ]
    missed: dict[str, list[str]] = {}
    for goal in GOALS:
        cells = [goal.cell(results) for results in by_hardware.values()]
        lines.append(f"| {goal.what} | {'<=' if goal.at_most else '>='} {goal.wanted:g} | {' | '.join(cells)} |")
        if any("**" in cell for cell in cells):
            missed.setdefault(goal.where, []).append(goal.what)
    lines += ["", "Where the time goes of those that are missed:", ""]
    return "\n".join([*lines, *(f"- {'; '.join(goals)}: {where}" for where, goals in missed.items()), ""])


def _decode(results: Results, system: str, sequences: int) -> float:
    return rows_of(results["generation"])[system, sequences]["decode_tokens_per_second"]


def _best(results: Results, systems: tuple[str, ...], sequences: int, phase: str = "decode") -> float:
    return best(rows_of(results["generation"]), systems, sequences, phase)


def _against(ours: str, theirs: str, *sequences: int) -> Callable[[Results], list[float]]:
    return lambda results: [_decode(results, ours, count) / _decode(results, theirs, count) for count in sequences]


def _of_the_limit(results: Results) -> list[float]:
    limits, rows = results["generation"]["roofline_step_milliseconds"], rows_of(results["generation"])
    steps = {count: min(rows[own, count]["decode_step_milliseconds"] for own in OWN) for count in (1, 8, 32)}
    return [limits[str(count)] / step for count, step in steps.items()]


def _first_byte(results: Results) -> list[float]:
    small, trivial = (_stream(results, name, 1)["first_p50_milliseconds"] for name in ("small", "trivial"))
    return [small - trivial]


def _stream(results: Results, server: str, streams: int) -> dict[str, Any]:
    return {(row["system"], row["streams"]): row for row in results["http_load"]["rows"]}[server, streams]


def _streams_against(server: str) -> Callable[[Results], list[float]]:
    def figures(results: Results) -> list[float]:
        ours, theirs = (_stream(results, name, 16)["tokens_per_second"] for name in ("serve", server))
        return [ours / theirs]

    return figures


def _start(system: str) -> Callable[[Results], list[float]]:
    def figures(results: Results) -> list[float]:
        ready = {row["system"]: row["ready_seconds"] for row in results["startup"]["rows"]}
        return [ready[system] / ready["vllm"]]

    return figures


def _frames(results: Results) -> list[float]:
    micros = results["frame_round_trip"]["microseconds"]
    return [micros["shared_memory"] / micros["bare"]]


def _long_context(results: Results) -> list[float]:
    longest = max(results["long_context"]["rows"], key=lambda row: row["context"])
    return [longest["step_milliseconds"] / longest["limit_milliseconds"]]


def _training(results: Results) -> list[float]:
    speeds = {row["system"]: row["tokens_per_second"] for row in results["training"]["rows"]}
    return [speeds["deepseek_ray"] / speeds["transformers"]]


def _loss_rise(results: Results) -> list[float]:
    rises = {row["quantization"]: row["against_none"] for row in results["quantization"]["rows"]}
    return [100 * rises["int8"]]


_SHARDS = (
    "the shards read their experts as fast as one process does; of a layer of 22 ms with 8 sequences some 2.5 ms are "
    "the way there, the later of two shards and the way back ([architecture](architecture.md#actors))."
)
_INTEGERS = (
    "attention over latents, norms, gates and Python do not shrink with the bits; int4 reads at some 0.9 of the rate "
    "of int8, for its scales lie beside its weights."
)

GOALS = (
    Goal(
        "decode 1 / 8 / 32, the better of local and actors, against the best peer",
        1.05,
        lambda results: [_best(results, OWN, count) / _best(results, PEERS, count) for count in (1, 8, 32)],
    ),
    Goal(
        "decode 1 / 8 / 32, of the limit",
        0.85,
        _of_the_limit,
        "with one sequence, a dozen products a layer begin one after the other, each with memory waiting, and without "
        "AVX-512 the threads still slept between them that day; with 32, the dense products run at 325 to 367 GFLOP/s "
        "where the probe reaches 440 at its best; reading was probed at other moments than those of the steps.",
    ),
    Goal(
        "prefill 8 x 128 against the best peer",
        1.2,
        lambda results: [_best(results, OWN, 8, "prefill") / _best(results, PEERS, 8, "prefill")],
    ),
    Goal(
        "actors, decode 8 / 32, against the best peer",
        1.0,
        lambda results: [_decode(results, "actors", count) / _best(results, PEERS, count) for count in (8, 32)],
        _SHARDS,
    ),
    Goal("actors, decode 8 / 32, against local", 0.95, _against("actors", "local", 8, 32), _SHARDS),
    Goal("deterministic, decode 1 / 8 / 32, against not", 0.85, _against("local", "fast", 1, 8, 32)),
    Goal("int8, decode 1 / 8, against bfloat16", 1.7, _against("int8", "bfloat16", 1, 8), _INTEGERS),
    Goal("int8, loss rise of the quickstart model, %", 0.5, _loss_rise, at_most=True),
    Goal("int4, decode 1 / 8, against bfloat16", 2.3, _against("int4", "bfloat16", 1, 8), _INTEGERS),
    Goal("int8, decode 1 / 8, against Q8_0 of llama.cpp", 1.1, _against("int8", "llama.cpp Q8_0", 1, 8), _INTEGERS),
    Goal("int4, decode 1 / 8, against Q4_0 of llama.cpp", 1.1, _against("int4", "llama.cpp Q4_0", 1, 8), _INTEGERS),
    Goal(
        "frame of 128 KB there and back, against an eventfd and a copy",
        1.3,
        _frames,
        "a wake-up by a socket through epoll costs some 25 us more than by an eventfd, and Python runs in caches that "
        "the sleep has emptied; steps were not faster where a round trip was ([architecture](architecture.md#actors)).",
        at_most=True,
    ),
    Goal(
        "HTTP, first token of one stream over a trivial stream's, ms",
        10,
        _first_byte,
        "it is checked and tokenised, admitted, sent to an engine in another process, and takes a step there.",
        at_most=True,
    ),
    Goal("HTTP, 16 streams, against `LLM` through actors", 0.9, _streams_against("llm")),
    Goal("HTTP, 16 streams, against vLLM", 1.1, _streams_against("vllm")),
    Goal("start to ready, against vLLM", 0.25, _start("local"), at_most=True),
    Goal("start to ready with the packed file, against vLLM", 0.1, _start("local, packed"), at_most=True),
    Goal(
        "decode of 8 sequences at 16k positions, step over its limit",
        1.3,
        _long_context,
        "attention multiplies at about 256 GFLOP/s with AVX-512 and is about half of the step; runs of one day gave "
        "1.28 to 1.78, as fast as memory was between the probe of the limit and the step.",
        at_most=True,
    ),
    Goal(
        "training, tokens/s against transformers",
        1.5,
        _training,
        "products bound both sides, and ours of experts run at the rate of torch's best product already; see the "
        "profile there.",
    ),
)

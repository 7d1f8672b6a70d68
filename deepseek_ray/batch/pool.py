"""A batch inference job on Ray: Ray Data over parts, one `LLM` per actor. The only file of this folder with Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepseek_ray.batch.generate import BatchGenerator, PartResult
from deepseek_ray.batch.outputs import open_output
from deepseek_ray.batch.prompts import Part, plan_parts
from deepseek_ray.config.batch import BatchConfig
from deepseek_ray.engine.offline import tokenizer_beside
from deepseek_ray.errors import DataError, DeepSeekRayError
from deepseek_ray.llm import LLM
from deepseek_ray.models.checkpoint import CheckpointReader


@dataclass(frozen=True)
class BatchResult:
    """What a job made."""

    output: str
    files: int
    """Of the whole job."""
    files_before: int
    """Of these, the ones that were there before."""
    rows: int
    """Generated now, as are the next two."""
    bad_rows: int
    tokens: int

    def describe(self) -> str:
        return f"{self.files} files in {self.output}, {self.files_before} of them were there before"


def generate_files(config: BatchConfig, say: Callable[[str], None]) -> BatchResult:
    """Write the output files that are missing; `say` hears a line for each.

    CheckpointError or DataError for what a person has to change. Uses the Ray this process is connected to, else
    starts a local one for the while; none when nothing is missing.
    """
    CheckpointReader(config.model_dir).validate()
    parts = plan_parts(config)
    missing = open_output(config, parts)
    before = done = len(parts) - len(missing)
    rows = bad_rows = tokens = 0
    for result in _generated(config, missing) if missing else ():
        done, rows = done + 1, rows + result.rows
        bad_rows, tokens = bad_rows + result.bad_rows, tokens + result.tokens
        say(f"part {done}/{len(parts)}: {result.rows} rows, {result.tokens} tokens, {bad_rows} bad rows so far")
    return BatchResult(config.output, len(parts), before, rows, bad_rows, tokens)


def _generated(config: BatchConfig, parts: Sequence[Part]) -> Iterator[PartResult]:
    """What became of each part, as they end. DataError when a part's file cannot be written."""
    import ray  # here, where there is something to generate: a finished job needs none

    from deepseek_ray.data.ingest import connected, quiet

    with connected(), quiet():
        threads = _threads_per_worker(config, int(ray.cluster_resources().get("CPU", 1)))
        pool = ray.data.ActorPoolStrategy(size=min(config.workers, len(parts)))
        results = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
            _Worker,  # type: ignore[arg-type]  # a class, where the hint knows functions only
            fn_constructor_args=(config.model_dump(mode="json"), threads),
            compute=pool,
            num_cpus=threads,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        for row in results.iter_rows():
            if error := row.pop("error"):
                raise DataError(error)
            yield PartResult(**row)


def _threads_per_worker(config: BatchConfig, cores: int) -> int:
    threads = config.threads or max(1, cores // config.workers)
    if threads * config.workers > cores:
        raise DataError(
            f"{config.workers} workers of {threads} cores do not fit: the cluster has {cores}; lower workers or threads"
        )
    return threads


class _Worker:
    """One actor of the pool."""

    def __init__(self, values: dict[str, Any], threads: int) -> None:
        config = BatchConfig.parse(values)
        llm = LLM(config.model_dir, dtype=config.dtype, threads=threads, max_model_len=config.max_model_len)
        self._generator = BatchGenerator(config, llm, tokenizer_beside(config.model_dir))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"error": "", **asdict(self._generator.run(Part(**row)))}
        except DeepSeekRayError as error:  # as a value: Ray would wrap it in an error with a worker's traceback
            return {"error": error.message, **asdict(PartResult(row["index"], rows=0, bad_rows=0, tokens=0))}

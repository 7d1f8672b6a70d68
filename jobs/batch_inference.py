"""Generate for files of prompts, with a pool of models side by side: Ray Data over parts, one `LLM` per actor.

    ray job submit --working-dir . -- python jobs/batch_inference.py --model-dir /models/mine \
        --input /data/prompts.jsonl --output /data/answers --max-tokens 128 --workers 4
    python jobs/batch_inference.py --model-dir runs/quickstart/model --input prompts.txt --output answers --chat

Rows are lines of JSONL (`--prompt-column`), rows of Parquet, or lines of text. Outputs are JSONL or Parquet files that
appear whole; the same command again generates only what is missing. A bad row says so in its own output.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster_python import use_cluster_python

if TYPE_CHECKING:
    from deepseek_ray.batch.prompts import Part
    from deepseek_ray.config.batch import BatchConfig


class Worker:
    """One actor of the pool."""

    def __init__(self, values: dict[str, Any], threads: int) -> None:
        from deepseek_ray.batch.generate import BatchGenerator
        from deepseek_ray.config.batch import BatchConfig
        from deepseek_ray.engine.offline import tokenizer_beside
        from deepseek_ray.llm import LLM

        config = BatchConfig.parse(values)
        llm = LLM(config.model_dir, dtype=config.dtype, threads=threads, max_model_len=config.max_model_len)
        self._generator = BatchGenerator(config, llm, tokenizer_beside(config.model_dir))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from deepseek_ray.batch.prompts import Part
        from deepseek_ray.errors import DeepSeekRayError

        try:
            return {"error": "", **asdict(self._generator.run(Part(**row)))}
        except DeepSeekRayError as error:  # as a value: Ray would wrap it in an error with a worker's traceback
            return {"error": error.message, "index": row["index"], "rows": 0, "bad_rows": 0, "tokens": 0}


def run(config: BatchConfig, parts: list[Part], total: int) -> None:
    """Generate `parts`, of `total`, on Ray. DataError when a part's file cannot be written."""
    import ray

    from deepseek_ray.data.ingest import connected, quiet
    from deepseek_ray.errors import DataError

    with connected(), quiet():
        cores = int(ray.cluster_resources().get("CPU", 1))
        threads = config.threads or max(1, cores // config.workers)
        if threads * config.workers > cores:
            raise DataError(
                f"{config.workers} workers of {threads} cores do not fit: the cluster has {cores}; lower workers or "
                "threads"
            )
        pool = ray.data.ActorPoolStrategy(size=min(config.workers, len(parts)))
        results = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map(
            Worker,
            fn_constructor_args=(config.model_dump(mode="json"), threads),
            compute=pool,
            num_cpus=threads,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        done, bad = total - len(parts), 0
        for row in results.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            done, bad = done + 1, bad + row["bad_rows"]
            print(f"part {done}/{total}: {row['rows']} rows, {row['tokens']} tokens, {bad} bad rows so far", flush=True)


def main() -> int:
    from deepseek_ray.config.batch import BatchConfig
    from deepseek_ray.errors import DeepSeekRayError

    parser = argparse.ArgumentParser(
        description="Generate for files of prompts on Ray.",
        epilog="Example: python jobs/batch_inference.py --model-dir M --input prompts.jsonl --output answers --chat",
    )
    for name, field in BatchConfig.model_fields.items():
        flag, help_text = f"--{name.replace('_', '-')}", " ".join((field.description or "as in SamplingParams").split())
        if name == "chat":
            parser.add_argument(flag, action="store_true", default=None, help=help_text)
        else:
            several = {"nargs": "+"} if name in ("input", "stop") else {}
            parser.add_argument(flag, required=field.is_required(), help=help_text.replace("%", "%%"), **several)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    try:
        config = BatchConfig.parse(given, "arguments")
        from deepseek_ray.batch.outputs import open_output
        from deepseek_ray.batch.prompts import plan_parts
        from deepseek_ray.models.checkpoint import CheckpointReader

        CheckpointReader(config.model_dir).validate()
        parts = plan_parts(config)
        missing = open_output(config, parts)
        if missing:
            run(config, missing, len(parts))
    except DeepSeekRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(parts)} files in {config.output}, {len(parts) - len(missing)} of them were there before", flush=True)
    return 0


if __name__ == "__main__":
    use_cluster_python()
    sys.exit(main())

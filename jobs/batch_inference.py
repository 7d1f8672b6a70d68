"""Generate for files of prompts, with a pool of models side by side: Ray Data over parts, one `LLM` per actor.

    ray job submit --working-dir . -- python jobs/batch_inference.py --model-dir /models/mine \
        --input /data/prompts.jsonl --output /data/answers --max-tokens 128 --workers 4
    python jobs/batch_inference.py --model-dir runs/quickstart/model --input prompts.txt --output answers --chat

Rows are lines of JSONL (`--prompt-column`), rows of Parquet, or lines of text. Outputs are JSONL or Parquet files that
appear whole; the same command again generates only what is missing. A bad row says so in its own output. The options
are those of `deepseek-ray batch` (`--help` lists them).
"""

from __future__ import annotations

import sys

from cluster_python import use_cluster_python


def main() -> None:
    from deepseek_ray.cli.main import main as command

    command(["batch", *sys.argv[1:]], told_by="error")


if __name__ == "__main__":
    use_cluster_python()
    main()

"""Measure a checkpoint: nats per token, perplexity, bits per byte, and the load of its experts.

    ray job submit --working-dir . -- python jobs/evaluate.py /models/mine --data /data/books.txt
    python jobs/evaluate.py runs/quickstart/model                           # validation split of the built-in corpus
    python jobs/evaluate.py runs/quickstart/model --data texts.jsonl --text-field body --json
    python jobs/evaluate.py runs/finetune/model --chat --data gsm8k_test.jsonl --prompt-field question \
        --completion-field answer                                           # of the answers only

One process on one machine, on its GPU if it has one; no cluster is needed. The options are those of
`deepseek-ray evaluate` (`--help` lists them).
"""

from __future__ import annotations

import sys

from cluster_python import use_cluster_python


def main() -> None:
    from deepseek_ray.cli.main import main as command

    command(["evaluate", *sys.argv[1:]], told_by="error")


if __name__ == "__main__":
    use_cluster_python()
    main()

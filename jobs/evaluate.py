"""Measure a checkpoint: nats per token, perplexity, bits per byte, and the load of its experts.

    ray job submit --working-dir . -- python jobs/evaluate.py /models/mine --data /data/books.txt
    python jobs/evaluate.py runs/quickstart/model                           # validation split of the built-in corpus
    python jobs/evaluate.py runs/quickstart/model --data texts.jsonl --text-field body --json
    python jobs/evaluate.py runs/finetune/model --chat --data gsm8k_test.jsonl --prompt-field question \
        --completion-field answer                                           # of the answers only

One process on one machine, on its GPU if it has one; no cluster is needed.
"""

from __future__ import annotations

import argparse
import json
import sys

from cluster_python import use_cluster_python


def main() -> int:
    from deepseek_ray.errors import DeepSeekRayError

    parser = argparse.ArgumentParser(
        description="Measure how well a checkpoint predicts texts or answers.",
        epilog="Example: python jobs/evaluate.py runs/quickstart/model --data texts.jsonl --json",
    )
    parser.add_argument("model_dir", help="checkpoint in the Hugging Face layout")
    parser.add_argument("--data", nargs="+", help="text, JSONL or Parquet files; default: the built-in corpus")
    parser.add_argument("--text-field", help="field that holds the text (default: text)")
    parser.add_argument("--chat", action="store_true", help="the files are conversations; measure the answers only")
    parser.add_argument("--messages-field", help="field with a conversation's messages (default: messages)")
    parser.add_argument("--prompt-field", help="field of a pair with the prompt (default: prompt)")
    parser.add_argument("--completion-field", help="field of a pair with the answer (default: completion)")
    parser.add_argument("--sequence-length", type=int, help="tokens that are seen together (default: 512)")
    parser.add_argument("--batch-size", type=int, help="samples per forward pass (default: 8)")
    parser.add_argument("--max-samples", type=int, help="measure the first samples only")
    parser.add_argument("--precision", help="bf16 or fp32 (default: fp32)")
    parser.add_argument("--threads", type=int, help="CPU cores to use")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    model_dir, as_json = given.pop("model_dir"), given.pop("json")
    try:
        from deepseek_ray.training.evaluate_model import EvaluationConfig, evaluate_model

        measured = evaluate_model(model_dir, EvaluationConfig.parse(given, "arguments"))
    except DeepSeekRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(measured.to_dict()) if as_json else measured.describe(), flush=True)
    return 0


if __name__ == "__main__":
    use_cluster_python()
    sys.exit(main())

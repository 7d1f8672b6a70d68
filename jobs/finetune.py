"""Fine-tune a checkpoint on conversations, all of it or low-rank adapters: from JSONL to a model that serves.

On a running cluster (`ray start --head`, or RAY_ADDRESS), from the repository's root; paths are those of the nodes:

    ray job submit --working-dir . -- python jobs/finetune.py --config configs/finetune/lora.yaml \
        --set base_model=/models/mine --set data.paths=[/data/gsm8k_train.jsonl] \
        --set data.validation_paths=[/data/gsm8k_test.jsonl] --set storage_path=/runs

Without a cluster the same file starts one on this machine for the while. A line of the data is
`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}` or a pair of fields
(`data.prompt_field`, `data.completion_field`). Starting it again with the same name and storage path resumes the run.
"""

from __future__ import annotations

import argparse
import sys

from cluster_python import use_cluster_python


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fine-tune a checkpoint on conversations, on Ray.",
        epilog="Example: python jobs/finetune.py --config configs/finetune/full.yaml --set base_model=/models/mine "
        "--set 'data.paths=[train.jsonl]' --set 'data.validation_paths=[held_out.jsonl]'",
    )
    parser.add_argument("--config", required=True, help="run file (YAML), for example configs/finetune/lora.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. lora.r=8")
    arguments = parser.parse_args()

    from deepseek_ray.config.finetune import FinetuneConfig
    from deepseek_ray.config.load import load_config
    from deepseek_ray.errors import DeepSeekRayError

    try:
        config = load_config(FinetuneConfig, arguments.config, arguments.set)
        from deepseek_ray.training.trainer import finetune  # torch and ray, after the configuration is known to be good

        print(finetune(config).describe(), flush=True)
    except DeepSeekRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    use_cluster_python()
    sys.exit(main())

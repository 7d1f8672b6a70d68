"""Pre-train a model: from text to a checkpoint in the Hugging Face layout.

On a running cluster (`ray start --head`, or RAY_ADDRESS), from the repository's root:

    ray job submit --working-dir . -- python jobs/pretrain.py --config configs/tiny.yaml --set training.steps=20

Without a cluster the same file starts one on this machine for the while:

    python jobs/pretrain.py --config configs/tiny.yaml

Starting it again with the same name and storage path resumes the run. A cluster must be able to write `storage_path`
and `data.cache_dir` under these names on every node. If `python` in the job's shell is not the environment's own, the
job starts itself again in the interpreter of the cluster's workers.
"""

from __future__ import annotations

import argparse
import sys

from cluster_python import use_cluster_python


def main() -> int:
    parser = argparse.ArgumentParser(description="Pre-train a DeepSeek-style model on Ray.")
    parser.add_argument("--config", required=True, help="run file (YAML), for example configs/tiny.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. optimizer.lr=1e-3"
    )
    arguments = parser.parse_args()

    from deepseek_ray.config.load import load_pretrain_config
    from deepseek_ray.errors import DeepSeekRayError

    try:
        config = load_pretrain_config(arguments.config, arguments.set)
        from deepseek_ray.training.trainer import pretrain  # torch and ray, after the configuration is known to be good

        print(pretrain(config).describe(), flush=True)
    except DeepSeekRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    use_cluster_python()
    sys.exit(main())

"""Search hyperparameters (or, with --architecture, model shapes): trials are Ray Train runs, the sweep is Ray Tune's.

On a running cluster (`ray start --head`, or RAY_ADDRESS), from the repository's root:

    ray job submit --working-dir . -- python jobs/tune.py configs/tiny.yaml --space tune_spaces.pretraining:space \
        --trials 4 --storage ~/deepseek-ray/runs

Without a cluster the same file starts one on this machine for the while. The options are those of `deepseek-ray tune`
(`--help` lists them). Starting it again with the same name and storage resumes the sweep, whatever killed it. The
storage must be a path that every node can write.
"""

from __future__ import annotations

import sys

from cluster_python import use_cluster_python


def main() -> None:
    sys.path.insert(0, "")  # the job's working directory, where tune_spaces/ is
    from deepseek_ray.cli.main import main as command

    command(["tune", *sys.argv[1:]])


if __name__ == "__main__":
    use_cluster_python()
    main()

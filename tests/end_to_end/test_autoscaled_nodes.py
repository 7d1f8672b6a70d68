"""More expert shards than the cluster has room for: Ray's autoscaler starts nodes, and the shards run there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.head_node import REPOSITORY, HeadNode, head_node

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROLE = {"deepseek-ray/role": "experts"}

# Starts a deployment whose shards no node can take yet, scales it, and says on which nodes everybody was.
PROGRAM = """
import json, sys
import ray
from deepseek_ray.actors.deployment import change_deployment, start_deployment
from deepseek_ray.config.engine import DeploymentConfig

ray.init(log_to_driver=False)
config = DeploymentConfig(
    name="scaled", model_dir=sys.argv[1], threads=2, reserve_cpus=True, expert_labels=json.loads(sys.argv[2])
)
nodes = lambda: sum(node["Alive"] for node in ray.nodes())
places = lambda: [(row["role"], row["node_id"]) for row in deployment.status()["actors"]]
seen = [nodes()]
deployment = start_deployment(config)
seen.append(nodes())
before = places()
change_deployment("scaled", "scale", None, 3, wait_seconds=120)
seen.append(nodes())
after = places()
deployment.stop()
print(json.dumps({"nodes": seen, "before": before, "after": after}))
"""


def run(head: HeadNode, model: Path) -> dict[str, Any]:
    environment = {**head.environment, "RAY_ADDRESS": head.gcs_address, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PROGRAM, str(model), json.dumps(ROLE)]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_autoscaler_starts_a_node_for_each_expert_shard(trained_model: Path) -> None:
    node_type = {"resources": {"CPU": 1}, "labels": ROLE, "max_workers": 3}
    with head_node({"PYTHONPATH": str(REPOSITORY)}, node_type) as head:
        seen = run(head, trained_model)
    assert seen["nodes"] == [1, 3, 4]
    for places, shards in ((seen["before"], 2), (seen["after"], 3)):
        (attention,) = (node for role, node in places if role == "attention_worker")
        experts = [node for role, node in places if role == "expert_shard"]
        assert len(set(experts)) == shards, "one CPU each"
        assert attention not in experts

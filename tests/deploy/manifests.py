"""The files under `deploy/`, read for the tests, and ways through them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERAY = REPOSITORY / "deploy" / "kuberay"
CLUSTER_FILES = [REPOSITORY / "cluster.yaml", REPOSITORY / "deploy" / "on-prem.yaml"]
CLUSTER_KEYS = {"RayCluster": (), "RayService": ("rayClusterConfig",), "RayJob": ("rayClusterSpec",)}
"""Where in `spec` the Ray cluster of each kind is."""
ROLE = "deepseek-ray/role"


@functools.cache
def documents() -> list[dict[str, Any]]:
    """Every Kubernetes object of `deploy/kuberay/`, to be read only."""
    return [found for path in sorted(KUBERAY.glob("*.yaml")) for found in yaml.safe_load_all(path.read_text())]


def document(kind: str) -> dict[str, Any]:
    (found,) = [one for one in documents() if one["kind"] == kind]
    return found


def cluster_spec(kind: str) -> dict[str, Any]:
    spec = document(kind)["spec"]
    for key in CLUSTER_KEYS[kind]:
        spec = spec[key]
    return spec


def ray_pods(kind: str) -> dict[str, dict[str, Any]]:
    """Pod specs of a cluster: of its head and of each worker group."""
    spec = cluster_spec(kind)
    pods = {"head": spec["headGroupSpec"]["template"]["spec"]}
    return pods | {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}


def all_pods(kind: str) -> dict[str, dict[str, Any]]:
    """`ray_pods`, and the one that submits a job."""
    submitter = document(kind)["spec"].get("submitterPodTemplate")
    return ray_pods(kind) | ({"submitter": submitter["spec"]} if submitter else {})


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    text = (REPOSITORY / "constraints.txt").read_text()
    found = re.search(rf"^{package}==(.+)$", text, re.MULTILINE)
    assert found, package
    return found[1]

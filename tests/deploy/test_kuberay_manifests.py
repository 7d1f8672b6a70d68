"""What the KubeRay manifests promise beyond their schemas: who gets in, what a pod may do, how it ends."""

from __future__ import annotations

import itertools
import json
import shlex
import tomllib

import pytest
import yaml
from manifests import (
    CLUSTER_KEYS,
    KUBERAY,
    REPOSITORY,
    ROLE,
    all_pods,
    cluster_spec,
    document,
    documents,
    pinned,
    ray_pods,
    walk,
)
from ray._private.label_utils import validate_node_label_syntax

from deepseek_ray.config.load import load_pretrain_config

kinds = pytest.mark.parametrize("kind", CLUSTER_KEYS)


@kinds
def test_ray_asks_for_the_token_and_is_the_tested_version(kind: str) -> None:
    spec = cluster_spec(kind)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == pinned("ray")


def test_images_are_those_of_this_version() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    images = {value for found in documents() for key, value in walk(found) if key == "image"}
    assert {image.rpartition(":")[2] for image in images} == {f"{version}-cpu", f"{version}-cuda"}


def test_nothing_is_reachable_from_outside() -> None:
    found = documents()
    assert {"Service", "Ingress", "Gateway"}.isdisjoint(one["kind"] for one in found)
    keys = [(key, value) for one in found for key, value in walk(one)]
    assert not [pair for pair in keys if pair[0] in ("hostNetwork", "hostPort", "hostPID", "hostIPC", "enableIngress")]
    for kind in CLUSTER_KEYS:
        assert cluster_spec(kind)["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_no_secret_is_in_the_files() -> None:
    assert "Secret" not in [one["kind"] for one in documents()]
    for path in KUBERAY.glob("*.yaml"):
        named = {
            value for one in yaml.safe_load_all(path.read_text()) for key, value in walk(one) if key == "secretName"
        }
        for name in named:
            assert f"kubectl create secret generic {name} " in path.read_text()


@kinds
def test_pods_run_without_rights(kind: str) -> None:
    for name, pod in all_pods(kind).items():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert name == "head" or pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
    sidecar = cluster_spec(kind)["autoscalerOptions"]["securityContext"]
    assert sidecar == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@kinds
def test_every_container_is_bounded_and_has_where_to_write(kind: str) -> None:
    for name, pod in all_pods(kind).items():
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["limits"].keys() and resources["limits"] == resources["requests"], (
                name
            )
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() <= volumes, name
            assert {"/tmp", "/home/ray"} <= set(mounts.values()), name
            assert name == "submitter" or {"/dev/shm", "/shared"} <= set(mounts.values()), name
    assert {"limits", "requests"} == cluster_spec(kind)["autoscalerOptions"]["resources"].keys()


@kinds
def test_shared_memory_fits_into_the_container(kind: str) -> None:
    for pod in ray_pods(kind).values():
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert _gibibytes(shm["sizeLimit"]) <= _gibibytes(pod["containers"][0]["resources"]["limits"]["memory"]) / 2


@kinds
def test_probes_ask_what_is_open_without_a_token(kind: str) -> None:
    """Readiness of whoever may answer HTTP includes Serve's proxy; liveness never does: to have none is no failure."""
    for name, pod in ray_pods(kind).items():
        container = pod["containers"][0]
        ready, live = (container[probe]["exec"]["command"][-1] for probe in ("readinessProbe", "livenessProbe"))
        assert "/api/local_raylet_healthz" in ready and "/api/local_raylet_healthz" in live
        assert ("/api/gcs_healthz" in ready) is (name == "head")
        assert ("localhost:8000/-/healthz" in ready) is (kind == "RayService" and name != "head")
        assert "8000" not in live


@kinds
def test_roles_are_labels_and_resources(kind: str) -> None:
    spec = cluster_spec(kind)
    assert spec["headGroupSpec"]["labels"] == {ROLE: "head"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        name = group["groupName"]
        assert group["labels"] == {ROLE: name}
        validate_node_label_syntax(group["labels"])
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {name: 1}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_only_the_groups_with_gpus_have_the_image_for_them() -> None:
    for kind in CLUSTER_KEYS:
        for name, pod in ray_pods(kind).items():
            container = pod["containers"][0]
            on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"].endswith("-cuda") is on_gpu, (kind, name)


def test_the_network_policy_lets_in_whom_it_names() -> None:
    policy, head = [one["spec"] for one in documents() if one["kind"] == "NetworkPolicy"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    to_port: dict[int | None, list[str]] = {}
    for rule in policy["ingress"]:
        (peer,) = rule["from"]
        labels = peer.get("podSelector", {}).get("matchLabels") or peer["namespaceSelector"]["matchLabels"]
        for port in rule.get("ports", [{"port": None}]):
            to_port.setdefault(port["port"], []).extend(labels)
    assert to_port == {
        None: ["ray.io/is-ray-node"],
        8265: ["app.kubernetes.io/name", "deepseek-ray/job-submitter"],
        8000: ["app.kubernetes.io/name", "deepseek-ray/client"],
        8080: ["kubernetes.io/metadata.name"],
    }
    assert all(rule.get("to") for rule in policy["egress"])
    assert head["policyTypes"] == ["Egress"]
    submitter = document("RayJob")["spec"]["submitterPodTemplate"]
    assert submitter["metadata"]["labels"] == {"deepseek-ray/job-submitter": "true"}


def test_the_job_runs_a_run_file_that_is_valid() -> None:
    python, script, *arguments = shlex.split(document("RayJob")["spec"]["entrypoint"])
    assert (python, script) == ("python", "/opt/deepseek-ray/jobs/pretrain.py")
    run_file = arguments[arguments.index("--config") + 1].removeprefix("/opt/deepseek-ray/")
    overrides = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    config = load_pretrain_config(REPOSITORY / run_file, overrides)
    mounts = {mount["mountPath"] for mount in ray_pods("RayJob")["train"]["containers"][0]["volumeMounts"]}
    assert f"/{config.run_dir.parts[1]}" in mounts and config.data.cache_dir.startswith("/shared/")
    (group,) = cluster_spec("RayJob")["workerGroupSpecs"]
    assert config.num_workers == group["replicas"]


def test_a_finished_job_leaves_no_cluster() -> None:
    spec = document("RayJob")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0


def _gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi"), quantity
    return int(quantity.removesuffix("Gi"))

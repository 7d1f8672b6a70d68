"""The RayService's Serve configuration, taken by Serve and built by the application it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import tiny_config, write_random_checkpoint
from fakes import write_byte_tokenizer
from manifests import ROLE, cluster_spec, document, ray_pods
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from deepseek_ray.config.serving import ServingConfig
from deepseek_ray.serving.scaling import plan_openai


@pytest.fixture(scope="module")
def deploy() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(document("RayService")["spec"]["serveConfigV2"]))


def serving_config(deploy: ServeDeploySchema) -> ServingConfig:
    return ServingConfig.parse(deploy.applications[0].args)


def test_clients_reach_workers_with_a_key_only(deploy: ServeDeploySchema) -> None:
    assert document("RayService")["spec"]["excludeHeadPodFromServeSvc"] is True
    assert (deploy.http_options.host, deploy.http_options.port) == ("0.0.0.0", 8000)
    key_file = Path(serving_config(deploy).api.api_key_file or "")
    for name, pod in ray_pods("RayService").items():
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "api-keys"]
        assert (Path(mount["mountPath"]), mount["readOnly"]) == (key_file.parent, True), name


def test_a_pod_ends_later_than_the_requests_it_answers(deploy: ServeDeploySchema) -> None:
    config = serving_config(deploy)
    drain = plan_openai(config.models, config.api).graceful_shutdown_timeout_s
    for name, pod in ray_pods("RayService").items():
        (_, pause) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert pod["terminationGracePeriodSeconds"] >= drain + int(pause), name
        assert document("RayService")["spec"]["rayClusterDeletionDelaySeconds"] >= pod["terminationGracePeriodSeconds"]


def test_models_are_on_the_shared_storage_and_fit_the_groups(deploy: ServeDeploySchema) -> None:
    config = serving_config(deploy)
    assert all(model.model_dir.startswith("/shared/") for model in config.models)
    groups = {group["groupName"]: group for group in cluster_spec("RayService")["workerGroupSpecs"]}
    assert config.api.min_replicas <= groups["attention"]["minReplicas"]
    assert config.api.max_replicas <= groups["attention"]["maxReplicas"]


def test_the_application_builds_and_the_overrides_name_its_deployments(
    deploy: ServeDeploySchema, tmp_path: Path
) -> None:
    (application,) = deploy.applications
    model_dir = write_random_checkpoint(tmp_path / "model", tiny_config(vocab_size=300))
    write_byte_tokenizer(model_dir)
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-a-test-and-of-nothing-else\n")
    arguments: dict[str, Any] = application.args
    arguments["models"] = [{**model, "model_dir": str(model_dir)} for model in arguments["models"]]
    arguments["api"] = {**arguments["api"], "api_key_file": str(keys)}
    built = import_attr(application.import_path)(arguments)
    (override,) = application.deployments
    assert override.name == built._bound_deployment.name
    options = override.ray_actor_options.model_dump(exclude_unset=True)
    assert options.pop("label_selector") == {ROLE: "attention"}
    assert options.items() <= built._bound_deployment.ray_actor_options.items(), "placed, and otherwise unchanged"

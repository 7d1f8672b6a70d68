"""The manifests against the schemas of KubeRay's resource definitions (`kuberay/` of the test data)."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from manifests import CLUSTER_KEYS, document

_DATA = Path(os.environ.get("DEEPSEEK_RAY_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "kuberay"


def strict(node: Any) -> Any:
    """What the API server checks, in words of JSON Schema: no unknown keys; numbers or strings where it takes both.

    Fields with rules in CEL, which nothing here can evaluate, must not be given at all.
    """
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "x-kubernetes-validations" in node:
        return False
    plain = {key: strict(value) for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if node.get("x-kubernetes-int-or-string"):
        plain.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    elif isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        plain.setdefault("additionalProperties", False)
    return plain


def errors(manifest: dict[str, Any]) -> list[str]:
    path = _DATA / f"{manifest['kind'].lower()}s.v1.schema.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set DEEPSEEK_RAY_TEST_DATA to the folder of the test data")
    definition = json.loads(path.read_text())
    assert manifest["apiVersion"] == f"{definition['group']}/{definition['version']}"
    found = jsonschema.Draft202012Validator(strict(definition["schema"])).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}"[:300] for error in found]


@pytest.mark.parametrize("kind", CLUSTER_KEYS)
def test_the_manifest_fits_the_schema(kind: str) -> None:
    assert errors(document(kind)) == []


@pytest.mark.parametrize("kind", CLUSTER_KEYS)
def test_misspelt_keys_and_wrong_types_are_found(kind: str) -> None:
    manifest = copy.deepcopy(document(kind))
    spec = manifest["spec"]
    for key in CLUSTER_KEYS[kind]:
        spec = spec[key]
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    spec["workerGroupSpecs"][0]["maxReplicas"] = "four"
    spec["authOptions"]["mode"] = "tokens"
    found = "\n".join(errors(manifest))
    assert "imagePulPolicy" in found
    assert "maxReplicas: 'four'" in found
    assert "'tokens'" in found

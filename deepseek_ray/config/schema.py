"""JSON Schema of a configuration file, for editors that complete and check YAML while it is typed."""

from __future__ import annotations

from typing import Any

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.model import ModelConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(cls: type[FrozenConfig]) -> dict[str, Any]:
    """The schema of what a file of this class may say, which is a little more than what the class holds.

    A run file may name a `config.json` in place of the model's fields, and may leave out `vocab_size`, which then is
    that of the tokenizer, or the whole model where there is a `base_model`.
    """
    schema = cls.model_json_schema()
    model = cls.model_fields.get("model")
    if model is not None and model.annotation is ModelConfig:
        fields = schema["$defs"][ModelConfig.__name__]
        fields["required"] = [name for name in fields["required"] if name != "vocab_size"]
        reference = schema["properties"]["model"]
        description = reference.pop("description", None)
        if "base_model" in cls.model_fields:
            fields["required"] = []
            schema["required"] = [name for name in schema["required"] if name != "model"]
        schema["properties"]["model"] = {"anyOf": [reference, {"type": "string"}], "description": description}
    return {"$schema": DIALECT, **schema}

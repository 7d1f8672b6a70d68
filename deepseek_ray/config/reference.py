"""`docs/configuration.md`: every key with its type, default, bounds and meaning, written from the JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from deepseek_ray.config.kinds import KINDS, Kind
from deepseek_ray.config.schema import json_schema

_HEAD = """# Configuration

<!-- Written by `deepseek-ray config reference > docs/configuration.md`; change the classes in deepseek_ray/config/. -->

```bash
deepseek-ray config validate configs/tiny.yaml                     # OK, or every problem with its file and line
deepseek-ray config show configs/tiny.yaml --origin                # what counts, and where each value is from
deepseek-ray config show configs/tiny.yaml --set training.steps=20
deepseek-ray config schema > run.schema.json                       # for the editor
```

A run is a YAML file; every key that is not in it has a default, but for those marked **required**. What counts, the
later the stronger:

1. the default in the configuration class,
2. the file,
3. the environment: `DEEPSEEK_RAY__TRAINING__STEPS=20` sets `training.steps` (two underscores for a dot),
4. `--set training.steps=20`, as often as needed; the last one for a key wins. Values are read as YAML: `null`,
   `[0.9, 0.95]`, `1e-4`.

Unknown keys, keys given twice and impossible values are refused before anything starts. Values that no file names but
that follow from others are shown as `derived`, for example `model.vocab_size` when the run trains its own tokenizer.

Editors with the YAML language server check and complete a file whose first line is
`# yaml-language-server: $schema=run.schema.json`.
"""


def reference_markdown() -> str:
    """The whole page."""
    told: dict[str, str] = {}
    return "\n".join([_HEAD, *(line for name, kind in KINDS.items() for line in _kind_section(name, kind, told))])


def _kind_section(name: str, kind: Kind, told: dict[str, str]) -> Iterator[str]:
    """`told` says under which heading each class's keys are told; it grows on the way."""
    schema = json_schema(kind.config_class)
    told[kind.config_class.__name__] = kind.title
    yield f"## {kind.title}\n"
    yield f"Kind `{name}` (`--kind {name}`): {kind.used_by}. {_one_line(schema.get('description', ''))}\n"
    yield from _table(schema, "", schema["$defs"])
    yield from _sections(schema, schema, "", kind.title, told)


def _sections(
    node: dict[str, Any], schema: dict[str, Any], prefix: str, title: str, told: dict[str, str]
) -> Iterator[str]:
    """One table for each section inside `node`, outer ones first; a class is told once on the page."""
    for key, field in node["properties"].items():
        name = _section_name(field)
        section = schema["$defs"].get(name, {})
        if "properties" not in section:
            continue
        path = f"{prefix}{key}[]" if "items" in field else f"{prefix}{key}"
        yield f"### `{path}`\n"
        if name in told:
            yield f"The keys are told under [{told[name]}](#{told[name].lower().replace(' ', '-')}).\n"
            continue
        told[name] = title
        yield f"{_one_line(section.get('description', ''))}\n"
        yield from _table(section, f"{path}.", schema["$defs"])
        yield from _sections(section, schema, f"{path}.", title, told)


def _table(section: dict[str, Any], prefix: str, classes: dict[str, Any]) -> Iterator[str]:
    """A row for each key. A section that says nothing of itself is described by its class."""
    required = section.get("required", [])
    yield "| key | type | default | allowed | meaning |"
    yield "|---|---|---|---|---|"
    for key, field in section["properties"].items():
        default = "**required**" if key in required else _default(field)
        meaning = field.get("description") or classes.get(_section_name(field), {}).get("description", "")
        cells = (f"`{prefix}{key}`", _type(field), default, _bounds(field), _one_line(meaning))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _section_name(field: dict[str, Any]) -> str:
    """The class of the keys inside a field, of each item of a list; "" if it has none."""
    for option in [field, *field.get("anyOf", []), field.get("items", {})]:
        if "$ref" in option:
            return option["$ref"].rpartition("/")[2]
    return ""


def _default(field: dict[str, Any]) -> str:
    if "$ref" in field or isinstance(field.get("default"), dict):
        return "see below"
    return f"`{json.dumps(field['default'])}`" if "default" in field else "derived"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option) for option in field["anyOf"]))
    if "enum" in field or "const" in field:
        return "choice"
    if "prefixItems" in field:
        return f"[{', '.join(_type(item) for item in field['prefixItems'])}]"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return {"object": "mapping", None: "any"}.get(field.get("type"), str(field.get("type")))


_BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "pattern": "`{}`",
}


def _bounds(field: dict[str, Any]) -> str:
    """Limits of one key alone; those between keys are told by the error that names them."""
    texts = [", ".join(f"`{value}`" for value in field.get("enum", [field["const"]] if "const" in field else []))]
    texts += [template.format(field[name]) for name, template in _BOUNDS.items() if name in field]
    texts += [_bounds(option) for option in field.get("anyOf", [])]
    return ", ".join(text for text in texts if text)


def _one_line(text: str) -> str:
    return " ".join(text.split())

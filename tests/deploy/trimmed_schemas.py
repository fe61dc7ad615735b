"""Makes tests/deploy/schemas: of the definitions of KubeRay and Kubernetes, what judges the files of deploy/kuberay.

    python -m tests.deploy.trimmed_schemas CRDS DEFINITIONS

CRDS: a folder with ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, which are 1 MB each, of KubeRay's repository
(helm-chart/kuberay-operator/crds). DEFINITIONS: _definitions.json of a version of Kubernetes, which the package
kubernetes-validate has. Both are under the licence Apache-2.0.

A schema keeps all keys of each object that the files use, and refuses others, as the API server does. Objects and lists
that they do not use are refused as well: run it again when a file uses one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
MANIFESTS = sorted((HERE.parents[1] / "deploy" / "kuberay").glob("*.yaml"))
#: Of a value that is no object and no list, what is kept. Formats such as int32 say nothing that matters here.
KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "anyOf", "oneOf")
PREFIX = "#/$defs/"


def manifests(path: Path) -> list[dict[str, Any]]:
    """The objects of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def trimmed(schema: dict[str, Any], values: list[Any], definitions: dict[str, Any]) -> Any:
    """Return the part of a schema that judges some values, and values like them."""
    schema = resolved(schema, definitions)
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return {"type": "object"}
    kept = {key: schema[key] for key in KEPT if key in schema}
    if not values:
        return kept if not {"properties", "additionalProperties", "items"} & set(schema) else False
    if "properties" in schema:
        kept["additionalProperties"] = False
        if schema.get("required"):
            kept["required"] = schema["required"]
        kept["properties"] = {
            key: trimmed(one, [value[key] for value in values if isinstance(value, dict) and key in value], definitions)
            for key, one in schema["properties"].items()
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        below = [one for value in values if isinstance(value, dict) for one in value.values()]
        kept["additionalProperties"] = trimmed(schema["additionalProperties"], below, definitions)
    elif "items" in schema:
        elements = [one for value in values if isinstance(value, list) for one in value]
        kept["items"] = trimmed(schema["items"], elements, definitions)
    return kept


def resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition(PREFIX)[2]]
    return schema


def schema_of(kind: str, version: str, crds: Path, definitions: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The whole schema of a kind, and where it comes from."""
    meta = {"$ref": f"{PREFIX}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    if version == "ray.io/v1":
        crd = yaml.safe_load((crds / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8"))
        (found,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
        schema = found["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = meta
        return {**schema, "required": ["apiVersion", "kind", "metadata", "spec"]}, "KubeRay"
    group = {"v1": "core.v1", "apps/v1": "apps.v1"}[version]
    schema = dict(definitions[f"io.k8s.api.{group}.{kind}"])
    return {**schema, "required": ["apiVersion", "kind", "metadata"]}, "Kubernetes"


def main(crds: Path, definitions_file: Path) -> None:
    definitions = json.loads(definitions_file.read_text(encoding="utf-8"))["$defs"]
    found: dict[tuple[str, str], list[Any]] = {}
    for path in MANIFESTS:
        for one in manifests(path):
            found.setdefault((one["kind"], one["apiVersion"]), []).append(one)
    for (kind, version), values in found.items():
        schema, source = schema_of(kind, version, crds, definitions)
        kept = trimmed(schema, values, definitions)
        kept["properties"]["apiVersion"], kept["properties"]["kind"] = {"const": version}, {"const": kind}
        note = f"Cut from the definitions of {source}, under the licence Apache-2.0, by tests/deploy/trimmed_schemas.py"
        text = json.dumps({"$comment": note, **kept}, indent=1, sort_keys=True) + "\n"
        (HERE / "schemas" / f"{kind.lower()}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

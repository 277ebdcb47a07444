"""Schemas of the API servers, from Kubeflow Trainer's and Kubernetes' own packages, made strict.

The packages are fetched as wheels and read in place, because three versions of one cannot be installed.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

WHEELS = Path(__file__).parents[3] / "build" / "wheels"
TRAINERS = {"2.0": "2.0.1", "2.1": "2.1.0", "2.2": "2.2.1", "2.3": "2.3.0"}  # kubeflow-trainer-api
KUBERNETES = "1.37.0"  # kubernetes-validate
CORE = f"kubernetes_validate/kubernetes-json-schema/v{KUBERNETES}-local-strict"
DUMP = """
import json
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

print(json.dumps(TrainerV1alpha1TrainJob.model_json_schema()))
"""


def fetch() -> None:
    """Fetch the missing wheels, about 25 MB."""
    wanted = [f"kubeflow-trainer-api=={version}" for version in TRAINERS.values()]
    for package in [*wanted, f"kubernetes-validate=={KUBERNETES}"]:
        if not _wheels(package):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", WHEELS, package]
            subprocess.run(command, check=True, capture_output=True)


def _wheels(package: str) -> list[Path]:
    name, _, version = package.partition("==")
    return sorted(WHEELS.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


class Schemas:
    """Schemas of a cluster with this Trainer."""

    def __init__(self, trainer: str) -> None:
        (wheel,) = _wheels(f"kubeflow-trainer-api=={TRAINERS[trainer]}")
        environment = {**os.environ, "PYTHONPATH": str(wheel)}
        dumped = subprocess.run(
            [sys.executable, "-c", DUMP], capture_output=True, text=True, check=True, env=environment
        )
        self._train_job = jsonschema.Draft202012Validator(_strict(json.loads(dumped.stdout)))
        (core,) = _wheels(f"kubernetes-validate=={KUBERNETES}")
        self._core = zipfile.ZipFile(core)
        definitions = Resource(json.loads(self._core.read(f"{CORE}/_definitions.json")), DRAFT202012)
        self._registry = Registry().with_resource("/api/_definitions.json", definitions)

    def errors(self, manifest: dict) -> list[str]:
        """Return each unknown field, and each value that is not allowed, by its path."""
        return sorted(found for error in self._of(manifest["kind"]).iter_errors(manifest) for found in _describe(error))

    def _of(self, kind: str) -> jsonschema.Draft202012Validator:
        if kind == "TrainJob":
            return self._train_job
        schema = json.loads(self._core.read(f"{CORE}/{kind.lower()}-v1.json"))
        return jsonschema.Draft202012Validator(schema, registry=self._registry)


def _strict(schema: dict) -> dict:
    """Refuse fields that a model does not have. Leave out that every field may be null, which means nothing here."""
    for model in [schema, *schema["$defs"].values()]:
        fields = model["properties"]
        if "actual_instance" in fields:  # a string or a number
            model.clear()
            model["anyOf"] = [each for each in fields["actual_instance"]["anyOf"] if each["type"] != "null"]
            continue
        model["additionalProperties"] = False
        for name, field in fields.items():
            some = [each for each in field.get("anyOf", []) if each.get("type") != "null"]
            if len(some) == 1:
                fields[name] = some[0]
    return schema


def _describe(error: jsonschema.ValidationError) -> list[str]:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        unknown = sorted(set(error.instance) - set(error.schema["properties"]))
        return [f'unknown field "{f"{path}.{name}".lstrip(".")}"' for name in unknown]
    return [f"{path}: {error.message}"]

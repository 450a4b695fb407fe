"""JSON Schemas for editors: completion, help and red lines while a YAML file is being written."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cpt_rft.config.engine import ENGINES, EngineConfig
from cpt_rft.config.load import REPOSITORY
from cpt_rft.config.methods import METHOD_KINDS, MethodConfig
from cpt_rft.config.schema import TASK_NAMES, Experiment

DIRECTORY = REPOSITORY / "configs" / "schema"


def documents() -> dict[str, dict[str, Any]]:
    """The schema of each kind of file, by file name.

    Files say less than objects do: a method file has no name of its own, and an experiment may name methods
    and an engine instead of spelling them out, or give changes to the named file.
    """
    experiment = Experiment.model_json_schema()
    changes = _changes()
    experiment["properties"]["methods"] |= {
        "anyOf": [
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
            {"type": "object", "additionalProperties": {"anyOf": [changes, {"type": "null"}]}, "minProperties": 1},
        ]
    }
    for key in ("additionalProperties", "type", "minProperties"):
        experiment["properties"]["methods"].pop(key, None)
    engines = [{"type": "string"}, *({"$ref": f"#/$defs/{model.__name__}"} for model in ENGINES.values())]
    for key, more in (("engine", []), ("rft_engine", [{"type": "null"}])):
        text = Experiment.model_fields[key].description
        experiment["properties"][key] = {"anyOf": [*engines, *more], "description": text}
    names = {"type": "string", "enum": [name for names in TASK_NAMES.values() for name in names]}
    experiment["properties"]["tasks"]["items"] = names
    experiment["properties"]["orders"]["items"]["items"] = names
    del experiment["$defs"]["EvaluationConfig"]["required"]  # the contract may fill it in
    for model in ENGINES.values():
        definition = experiment["$defs"][model.__name__]
        definition["properties"]["extends"] = {
            "type": "string",
            "description": "The configs/engines/*.yaml to start from.",
        }
        definition["required"] = ["name"]
    for unused in ("SftMethod", "GrpoMethod"):
        experiment["$defs"].pop(unused, None)
    for part in ("Replay", "Ewc", "L2", "Lwf", "Average", "Lora", "Filter", "Rollouts", "Alternate"):
        experiment["$defs"][part].pop("required")  # a change may name one key of a part
    method = TypeAdapter(MethodConfig).json_schema()
    for kind in METHOD_KINDS.values():
        definition = method["$defs"][kind.__name__]
        del definition["properties"]["name"]
        definition["required"].remove("name")
    return {
        "experiment.json": experiment,
        "method.json": method,
        "engine.json": TypeAdapter(EngineConfig).json_schema(),
    }


def _changes() -> dict[str, Any]:
    """Any keys of any method, none required, and the file to start from."""
    properties: dict[str, Any] = {}
    for model in METHOD_KINDS.values():
        properties |= model.model_json_schema()["properties"]
    properties["kind"] = {"enum": list(METHOD_KINDS), "description": "Which objective."}
    del properties["name"]
    properties["extends"] = {"type": "string", "description": "The configs/methods/*.yaml to start from."}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def write_schemas(directory: Path = DIRECTORY) -> list[Path]:
    """Write every schema; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, document in documents().items():
        paths.append(directory / name)
        paths[-1].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return paths

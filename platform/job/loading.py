"""From YAML text and `--set` overrides to a job, and from pydantic's errors to one message of ours.

YAML here is YAML 1.1 as PyYAML reads it, with three changes that spare surprises: `3e-4` is a number, a date
stays text, and a key given twice is an error. Nothing is executed (safe loader).

Thread-safety: pure functions; only `read_mapping` touches the disk.
"""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from everstep.platform.job.errors import MISSING, Problem, SpecError

M = TypeVar("M", bound=BaseModel)
_RULES = "everstep_rules"
_EXAMPLE_FILE = "see examples/ for a job file that works"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the changes that the module docstring names."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if tag != "tag:yaml.org,2002:timestamp"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            continue  # construct_mapping reports it better
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands here twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """Returns the plain data of one YAML document; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a safe loader


def read_mapping(path: Path) -> dict[str, Any]:
    """Returns the job file's mapping; raises SpecError when it cannot be read or is not one."""
    source = str(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refuse(
            "", source, "an existing job file", f"check the path; {_EXAMPLE_FILE}", "no such file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _refuse(
            "", source, "a readable text file", "check the path and its rights", f"cannot be read: {error}"
        ) from None
    except yaml.YAMLError as error:
        raise _refuse("", source, "valid YAML", "correct the place named above", f"not YAML: {error}") from None
    if not isinstance(data, dict):
        raise _refuse(
            "",
            source,
            "a YAML map with name, task and steps",
            _EXAMPLE_FILE,
            f"holds {type(data).__name__}, no map",
        )
    return data


def override(data: dict[str, Any], overrides: list[str], source: str = "job") -> dict[str, Any]:
    """Returns a copy of the data with `a.b=YAMLVALUE` applied in order (lists: `faults.0.rank=1`)."""
    result = copy.deepcopy(data)
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(Problem("--set", text, "FIELD=VALUE", "for example `--set ranks.max=2`"))
            continue
        try:
            value = parse_yaml(value_text)
        except yaml.YAMLError as error:
            problems.append(Problem(f"--set {key}", value_text, "a YAML value", "quote it", f"not YAML: {error}"))
            continue
        why = _put(result, parts, value)
        if why:
            problems.append(
                Problem(f"--set {key}", value, "a field of the job file", "set the whole field instead", why)
            )
    if problems:
        raise SpecError(problems, source)
    return result


def _put(data: dict[str, Any], parts: list[str], value: Any) -> str:
    """Sets one value in place; returns why not, or ""."""
    here: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        at = ".".join(parts[:depth]) or "the job"
        key: Any = part
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                return f"{at} is a list of {len(here)}; {part!r} is none of its places"
            key = int(part)
        elif not isinstance(here, dict):
            return f"{at} is {here!r}, which has no fields"
        if last:
            here[key] = value
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]
    return ""


def build(model: type[M], data: dict[str, Any], source: str) -> M:
    """Validates plain data; raises SpecError with every problem that pydantic and our rules find."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(problems_of(error, model, data), source) from None


def broken_rules(problems: list[Problem]) -> PydanticCustomError:
    """Wraps our own problems for the way through pydantic."""
    text = "; ".join(f"{p.field}: {p.why or p.allowed}" for p in problems)
    return PydanticCustomError(_RULES, "{text}", {"text": text, "problems": problems})


def problems_of(error: ValidationError, model: type[BaseModel], data: Any) -> list[Problem]:
    """Turns pydantic's errors into ours: one a field (the branches of a union are merged)."""
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == _RULES:
            found.update({p.field: p for p in detail["ctx"]["problems"]})
            continue
        problem = _problem(detail, model, data)
        found.setdefault(problem.field, problem)
    return list(found.values())


def _problem(detail: ErrorDetails, model: type[BaseModel], data: Any) -> Problem:
    path, owner, info, inside = _locate(detail["loc"], model, data)
    field = ".".join(str(part) for part in path)
    if detail["type"] == "extra_forbidden":
        names = list(owner.model_fields) if owner else []
        close = difflib.get_close_matches(str(path[-1]), names, 1)
        fix = f"did you mean `{close[0]}`?" if close else "remove it"
        return Problem(field, detail["input"], f"one of {', '.join(names)}", fix, "no such field")
    allowed = (info.description if info else None) or detail["msg"]
    examples = (info.examples if info else None) or ["…"]
    example = examples[0]
    shown = (
        example if isinstance(example, str) else str(example).lower() if isinstance(example, bool) else repr(example)
    )
    fix = f"for example `--set {field}={shown}`"
    if detail["type"] == "missing":
        return Problem(field, MISSING, allowed, f"add it to the job file, or {fix}")
    value = detail["input"]
    if inside:
        fix = "change it in the job file"
    return Problem(field, value, allowed, fix, _complaint(value, detail))


def _complaint(value: Any, detail: ErrorDetails) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a map",
    }
    if detail["type"] == "literal_error" and isinstance(value, str):
        return "no such choice"
    if detail["type"].endswith("_type") or detail["type"] == "literal_error":
        found = "null" if value is None else names.get(type(value), type(value).__name__)
        return f"this is {found}, which is not accepted here"
    return "out of range or malformed"


def _locate(
    loc: tuple[int | str, ...], model: type[BaseModel], data: Any
) -> tuple[list[int | str], type[BaseModel] | None, Any, bool]:
    """Follows pydantic's location through models and data, dropping the names of union branches that it adds.

    Returns the path, the model and the field (its info) that it ends in, and whether it ends inside that
    field's value rather than at it.
    """
    path: list[int | str] = []
    owner: type[BaseModel] | None = model
    info: Any = None
    inside = False
    here: Any = model
    value = data
    for index, part in enumerate(loc):
        if isinstance(here, type) and issubclass(here, BaseModel):
            owner = here
            fields = here.model_fields
            info, inside = fields.get(str(part)), False
            here = _inner(info.annotation) if info else None
        elif isinstance(here, _Elements):
            here = here.of
        elif (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            inside = True
        elif index > 0:
            continue
        path.append(part)
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return path, owner, info, inside


def _inner(annotation: Any) -> Any:
    """Returns the model inside `Model | None` or `tuple[Model, ...]`, else the annotation.

    A tuple's index is a part of the location too; fields are then looked up in its element's model.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        models = [a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        return models[0] if models else None
    if origin is tuple:
        return _Elements(typing.get_args(annotation)[0])
    return annotation


class _Elements:
    """Marks that the next part of a location is an index into a list of this type."""

    def __init__(self, of: Any) -> None:
        self.of = of


def _refuse(field: str, value: Any, allowed: str, fix: str, why: str) -> SpecError:
    return SpecError([Problem(field, value, allowed, fix, why)], str(value))

"""Read an experiment from YAML, and say in a user's words what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from orpo_distill.component import Component, component_class, type_name
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError

C = TypeVar("C", bound=Component)
M = TypeVar("M", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment. `overrides` are `dotted.key=value`. Raises ConfigError with every problem found."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a YAML file at {path}, found: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, found: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> Config:
    """Validate settings that are already plain data. Raises ConfigError with every problem found."""
    return _validate(Config, data, "")


def parse_component(family: type[C], spec: dict[str, Any], where: str) -> C:
    """A component from its options, for instance of the command line's flag `where`. Raises ConfigError."""
    return _validate(family, spec, f"{where}: ")


def _validate(model: type[M], data: dict[str, Any], where: str) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A default that could not be computed follows from another error.
        found = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
        problems = [where + _explain(item, model, data) + _how_to_add(item, where, data) for item in found]
        raise ConfigError(problems) from error


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"expected key=value, found {override!r}; for instance train.learning_rate=1e-5")
    if not text.strip():
        raise ConfigError(f"expected a value behind {key}=, found none; write {key}=null for no value, or '{key}=\"\"'")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"expected a YAML value in {override!r}, found: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        child = data.get(parent)
        if isinstance(child, str):  # `task: gsm8k` and an option of it
            child = {"type": child}
        data[parent] = child if isinstance(child, dict) else {}
        data = data[parent]
    data[last] = value


WANTED = {  # in a user's words, by the kind of pydantic's error
    "model": "expected settings ({key: value, ...})",
    "model_attributes": "expected settings ({key: value, ...})",
    "dict": "expected settings ({key: value, ...})",
    "string": "expected text",
    "int": "expected a whole number",
    "float": "expected a number",
    "bool": "expected true or false",
    "list": "expected a list",
    "tuple": "expected a list",
    "path": "expected a path",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 (no dot) as text; everybody who writes it means the number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that stands twice: plain YAML takes the last one without a word."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?|\.\d)\d*[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Plain data from YAML, by the safe loader. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # PyYAML's own slips
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def _explain(error: Any, model: type[BaseModel], data: Any) -> str:
    """One of pydantic's errors in a user's words."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_near(model, location, data)}"
    if error["type"] == "missing":
        return f"{where}: expected {_wanted(model, location, data)}, found none; add it"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    message = re.sub(r"^input should be (?=greater|less)", "expected a number ", message)
    message = re.sub(r"^input should (be|have|match) ", "expected ", message)
    message = WANTED.get(error["type"].partition("_parsing")[0].removesuffix("_type"), message)
    message = message if "found" in message else f"{message}, found {error['input']!r}"
    return f"{where}: {message}" if where else message


def _how_to_add(error: Any, where: str, data: Mapping[str, Any]) -> str:
    """How an option that is missing is written on the command line, behind the flag `where`."""
    if not where or error["type"] != "missing":
        return ""
    return f": {where.removesuffix(': ')} '{{type: {data.get('type')}, {error['loc'][-1]}: ...}}'"


def _wanted(model: type[BaseModel], location: Sequence[str], data: Any) -> str:
    """What a key stands for that is missing: the names of its family, where it has one."""
    field = _field(model, location, data)
    for kind in _classes(field.annotation if field else None):
        if issubclass(kind, Component) and kind.types:
            return f"one of {', '.join(sorted(kind.types))} or module:Class"
    return "a value"


def _near(model: type[BaseModel], location: Sequence[str], data: Any) -> str:
    """What a user may have meant by a key that is unknown: one like it, or, of a component, one of another type."""
    found = _model_at(model, location[:-1], data)
    keys = list(found.model_fields) if found else []
    if near := get_close_matches(location[-1], keys, n=1):
        return f"; did you mean {near[0]!r}?"
    if found is None or not issubclass(found, Component):
        return ""
    others = f"; {'.'.join(location[:-1])}=TYPE takes another type and drops these keys" if len(location) > 1 else ""
    return f" of {type_name(found)}, which has {', '.join(keys) or 'none'}{others}"


def _field(model: type[BaseModel], location: Sequence[str], data: Any) -> FieldInfo | None:
    """The field at a place of the settings, None where no model has it."""
    found = _model_at(model, location[:-1], data)
    return found.model_fields.get(location[-1]) if found and location else None


def _model_at(model: type[BaseModel], location: Sequence[str], data: Any) -> type[BaseModel] | None:
    """The model whose keys stand at a place of the settings: of a component, the one that is named there."""
    if issubclass(model, Component) and "types" in model.__dict__:
        name = data.get("type", model.default_type) if isinstance(data, dict) else str(data)
        try:
            model = component_class(model, name)
        except ValueError:  # named in an error of its own
            return None
    if not location:
        return model
    field = model.model_fields.get(location[0])
    kinds = [kind for kind in _classes(field.annotation if field else None) if issubclass(kind, BaseModel)]
    inner = data.get(location[0]) if isinstance(data, dict) else None
    return _model_at(kinds[0], location[1:], inner) if kinds else None


def _classes(annotation: Any) -> list[type[Any]]:
    """Every class in an annotation such as `LoraSection | None`."""
    if isinstance(annotation, type):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _classes(part)]

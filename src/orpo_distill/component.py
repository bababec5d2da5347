"""Component: a frozen value that YAML can name. Its fields are its options; its one method is what it does.

A *family* is an abstract component (`Task`, `Verifier`, `Sampler`, `Objective`) with a table of short names. A field
annotated with a family accepts, from YAML or Python, any of

    number                                  a short name of the family's table
    {type: number, ...options}              the same with options
    {type: my_lab.verifiers:Strict, ...}    any importable subclass: no edit in this package is needed
    Number(...)                             a component
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from orpo_distill.errors import OrpoDistillError, RunError

C = TypeVar("C", bound="Component")


class SpeedOnly:
    """Marks an option that may change cost or rounding but never the method: `Annotated[int, SPEED_ONLY]`.

    Every option without this mark is part of its stage's fingerprint.
    """


SPEED_ONLY = SpeedOnly()


class Options(BaseModel):
    """A frozen set of options in which an unknown key is an error. Base of components and of config sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Component(Options):
    """A frozen value that YAML can name. See the module's text."""

    family: ClassVar[str] = ""
    types: ClassVar[Mapping[str, str]] = {}
    default_type: ClassVar[str] = ""  # the short name that a mapping without `type` stands for

    @model_validator(mode="wrap")
    @classmethod
    def _from_spec(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if "types" not in cls.__dict__ or isinstance(value, Component):
            return handler(value)
        if isinstance(value, str):
            value = {"type": value}
        options = dict(value) if isinstance(value, Mapping) else {}
        if isinstance(value, Mapping) and cls.default_type:
            options.setdefault("type", cls.default_type)
        if not isinstance(options.get("type"), str):
            raise ValueError(f"expected {_choices(cls)} or a mapping with `type`, found {value!r}")
        return component_class(cls, options.pop("type")).model_validate(options)

    @model_serializer(mode="wrap")
    def _to_spec(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"type": type_name(type(self)), **handler(self)} if self.types else handler(self)


def component_class(family: type[C], name: str) -> type[C]:
    """The class that `name` (a short name of the family, or `module:Class`) stands for.

    Raises ValueError, with a suggestion, for a name that leads to no subclass of the family.
    """
    path = family.types.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        near = get_close_matches(name, family.types, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected {_choices(family)}, found {name!r}{hint}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module may do anything
        raise ValueError(
            f"expected an importable {family.family} at {path!r}, found {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, family)):
        raise ValueError(f"expected a subclass of {family.__name__} at {path!r}, found {found!r}")
    return found


def type_name(cls: type[Component]) -> str:
    """How YAML names a component's class: its short name where it has one, else `module:Class`."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((short for short, target in cls.types.items() if target == path), path)


@contextmanager
def blamed(component: Component) -> Iterator[None]:
    """Inside the block, what a component of a user's own (named as `module:Class`) raises becomes a RunError."""
    try:
        yield
    except OrpoDistillError:
        raise
    except Exception as error:
        name = type_name(type(component))
        if ":" not in name:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(
            f"expected {name} to do its work, found {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
            "what was finished is kept: mend it and run the same command"
        ) from error


def method_options(value: Any) -> Any:
    """`value` as plain data without its speed-only options: what a stage's fingerprint hashes."""
    if isinstance(value, BaseModel):
        plain = {
            name: method_options(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not any(isinstance(mark, SpeedOnly) for mark in field.metadata)
        }
        return {"type": type_name(type(value)), **plain} if isinstance(value, Component) else plain
    if isinstance(value, Mapping):
        return {str(key): method_options(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [method_options(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(method_options(item) for item in value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _choices(family: type[Component]) -> str:
    return f"one of {', '.join(sorted(family.types))} or module:Class"

"""A model is a value: frozen dataclasses that print, compare, save as JSON and build plain torch modules."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Union

from paperworks.core.errors import unknown

_MAX_NESTING = 50  # no architecture nests deeper; a hostile file must not exhaust the stack


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every spec. Subclasses are frozen keyword-only dataclasses with a `build` method.

    Construction checks each field against its annotation, so a misspelt or mistyped value fails there with a
    `ValueError` that names the field; a subclass adds its own rules in `validate`.
    """

    registry: ClassVar[dict[str, type["Spec"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Spec.registry.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two specs are called {cls.__name__}: {known.__module__} and {cls.__module__}")
        Spec.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, annotation in _annotations(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, annotation):
                raise ValueError(f"{type(self).__name__}.{name} must be {_describe(annotation)}, got {value!r}")
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` naming the field when fields that are right one by one do not fit together."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: the fields plus the type tag under "type"."""
        return {"type": type(self).__name__} | {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a spec from `to_dict`'s output. Raises `ValueError` for unknown types or fields."""
        spec = _revive(data, depth=0)
        if not isinstance(spec, cls):
            raise ValueError(f"expected the description of a {cls.__name__}, got {type(spec).__name__}")
        return spec


_ANNOTATIONS: dict[type[Spec], dict[str, Any]] = {}


def _annotations(cls: type[Spec]) -> dict[str, Any]:
    if cls not in _ANNOTATIONS:
        hints = typing.get_type_hints(cls)
        _ANNOTATIONS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _ANNOTATIONS[cls]


def _fits(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if annotation in (None, type(None)):
        return value is None
    if annotation is Any:
        return True
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple of {_describe(arguments[0])}"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _revive(value: Any, depth: int) -> Any:
    if depth > _MAX_NESTING:
        raise ValueError(f"a spec nests at most {_MAX_NESTING} levels deep")
    if isinstance(value, list):
        return tuple(_revive(item, depth + 1) for item in value)
    if not isinstance(value, Mapping):
        return value
    tag = value.get("type")
    if not isinstance(tag, str) or tag not in Spec.registry:
        raise ValueError(unknown("spec type", str(tag), Spec.registry))
    cls = Spec.registry[tag]
    fields = _annotations(cls)
    for name in value:
        if name != "type" and name not in fields:
            raise ValueError(unknown(f"field of {tag}", str(name), fields))
    try:
        return cls(**{name: _revive(item, depth + 1) for name, item in value.items() if name != "type"})
    except TypeError as error:
        raise ValueError(f"{tag} cannot be built from these fields: {error}") from error

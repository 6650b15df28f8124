"""A document against a pydantic model: the model, or every problem with its place and its fix.

A field's description completes the sentence "expected ...".
"""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .document import Document, Path_
from .errors import PolicyError, Problem, listed, nearest, shown

Model = TypeVar("Model", bound=BaseModel)


def validated(document: Document, top: type[Model]) -> Model:
    """The model of a document.

    Raises:
        PolicyError: every problem that one field shows, each with its place.
    """
    try:
        return top.model_validate(document.value)
    except ValidationError as e:
        problems = [_problem(document, dict(error), top) for error in e.errors()]
        raise PolicyError(document.file, dict.fromkeys(problems)) from None


def _problem(document: Document, error: dict[str, Any], top: type[BaseModel]) -> Problem:
    path = _place(document, error)
    model, field, here = _declared(path, top)
    keys = [f.alias or name for name, f in model.model_fields.items()]
    last = path[-1] if path else ""
    match error["type"]:
        case "extra_forbidden":
            message = f'unknown key "{last}"{nearest(last, keys)} (valid: {listed(keys)})'
            return document.problem(path[:-1], message, at=path)
        case "missing":
            message = f'"{last}" is missing: expected {field.description}'
            return document.problem(path[:-1], message)
        case "value_error":
            return document.problem(path, str(error["ctx"]["error"]))
    expected, found = field.description, error["input"]
    if _is_model(here):
        expected = "a mapping with " + listed(f.alias or n for n, f in here.model_fields.items())
    choices = [c for c in get_args(here) if isinstance(c, str)]
    guess = nearest(found, choices) if isinstance(found, str) else ""
    message = f"expected {expected}, found {shown(found)}{guess}"
    # Where nothing stands, YAML's position is that of the next thing: point at the key.
    return document.problem(path, message, at=path if found is None else None)


def _place(document: Document, error: dict[str, Any]) -> Path_:
    """The place of an error, without what pydantic adds for a field of several types."""
    path: Path_ = error["loc"]
    value: Any = document.value
    for depth, step in enumerate(path):
        try:
            value = value[step]
        except (LookupError, TypeError):
            return path if error["type"] == "missing" else path[:depth]
    return path


def _declared(path: Path_, top: type[BaseModel]) -> tuple[type[BaseModel], Any, Any]:
    """For a place: the model around it, the field that declares it, and what stands there."""
    model: type[BaseModel] = top
    field: Any = None
    here: Any = top
    for step in path:
        if _is_model(here):
            model = here
            fields = {f.alias or name: f for name, f in model.model_fields.items()}
            if step not in fields:
                break
            field = fields[str(step)]
            here = field.annotation
            if type(None) in get_args(here):
                here = next(a for a in get_args(here) if a is not type(None))
            if hasattr(here, "__metadata__"):  # a type that several fields share
                field = next((m for m in here.__metadata__ if isinstance(m, FieldInfo)), field)
                here = here.__origin__
        else:  # an item of a list or of a mapping
            here = get_args(here)[-1] if get_args(here) else Any
    return model, field, here


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)

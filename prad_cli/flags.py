"""A command whose flags are the fields of a class: a service's settings, or what a benchmark can be told.

The class is imported when its command runs, so typer cannot know its fields as it puts `prad` together:
`prad` passes such a command's arguments on, and a second command, made here from the fields, reads them.
"""

import inspect
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings
from rich.markup import escape

from prad.settings import environment_name

PASS_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

M = TypeVar("M", bound=BaseModel)


def read_flags(kind: type[M], context: typer.Context, text: str, epilog: str | None = None) -> M:
    """What the arguments in `context` make of `kind`; `text` and `epilog` stand in its --help.

    typer's exit and usage errors for --help and for flags that there are not; exit 2 with a line for each
    value that the class refuses.
    """
    given: dict[str, Any] = {}
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(help=escape(text), epilog=epilog, context_settings={"help_option_names": ["-h", "--help"]})(
        _taking(kind, given)
    )
    command = typer.main.get_command(app)
    with command.make_context(context.info_name, context.args, parent=context.parent) as inner:
        command.invoke(inner)
    try:
        return kind(**given)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            source = _source(kind, name, given)
            got = f" (got {problem['input']!r})" if _may_be_shown(kind, name) else ""
            wrong = f": {problem['msg']}{got}"
            if problem["type"] == "missing":
                wrong = " is required"
            typer.secho(f"error: {source}{wrong}", fg="red", err=True)
        raise typer.Exit(2) from error


def _may_be_shown(kind: type[BaseModel], name: str) -> bool:
    """Not what may hold a password."""
    field = kind.model_fields.get(name)
    return field is None or field.repr


def _source(kind: type[BaseModel], name: str, given: Mapping[str, Any]) -> str:
    """Where a value came from: a flag, or the environment where there is none."""
    if name not in given and issubclass(kind, BaseSettings):
        variable = environment_name(kind, name)
        if variable in os.environ:
            return f"{variable} in the environment"
    return _flag(name)


def _taking(kind: type[BaseModel], given: dict[str, Any]) -> Any:
    """A function with a keyword per field. It keeps those that were given, as they were: pydantic reads."""

    def take(**values: Any) -> None:
        given.update({name: value for name, value in values.items() if value is not None})

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, field))
        for name, field in kind.model_fields.items()
    ]
    take.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return take


def _option(name: str, field: FieldInfo) -> Any:
    value, many = value_of(field.annotation)
    help_text = escape(_with_default(field))
    if value is bool:
        names = f"{_flag(name)}/--no-{name.replace('_', '-')}"
        return Annotated[bool | None, typer.Option(names, help=help_text)]
    option = typer.Option(_flag(name), help=help_text, metavar=_metavar(value))
    return Annotated[list[str] | None, option] if many else Annotated[str | None, option]


def value_of(annotation: Any) -> tuple[Any, bool]:
    """What one value of a field is, None apart, and whether there may be many."""
    if get_origin(annotation) is Annotated:
        return value_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        (only,) = (each for each in get_args(annotation) if each is not types.NoneType)
        return value_of(only)
    if get_origin(annotation) is list:
        return value_of(get_args(annotation)[0])[0], True
    return annotation, False


def _metavar(value: Any) -> str:
    names: Mapping[Any, str] = {int: "<int>", float: "<float>", Path: "<path>"}
    if get_origin(value) is Literal:
        return f"<{'|'.join(map(str, get_args(value)))}>"
    return names.get(value, "<str>")


def _with_default(field: FieldInfo) -> str:
    said = " ".join((field.description or "").split())
    default = field.get_default(call_default_factory=False)
    if value_of(field.annotation)[1]:
        said = "; ".join(filter(None, (said.rstrip("."), "repeatable")))
    if field.is_required():
        return f"{said}  [required]"
    if default is None or default is False or default is PydanticUndefined:
        return said
    if default is True:
        default = "yes"
    elif isinstance(default, list):
        default = ", ".join(map(str, default))
    return f"{said}  [default: {default}]"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

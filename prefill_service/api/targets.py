"""Which adapter version a request wants: named as `task` or as `model`, or pinned as `task@3`; or none."""

import re
from dataclasses import dataclass

from prefill_service.api.protocols import Catalogue
from prefill_service.api.schemas import GenerationRequest
from prefill_service.errors import InvalidRequestError, UnknownModelError
from prefill_service.generation import TaskVersion

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Target:
    """`version` None is the plain model. `name`: as the client wrote it, and as the response repeats it."""

    name: str
    version: TaskVersion | None


def find_target(request: GenerationRequest, catalogue: Catalogue) -> Target:
    """The one place where task becomes version. Raises InvalidRequestError, UnknownModelError."""
    name, param = _wanted(request, catalogue.base_name)
    if name is None:
        return Target(catalogue.base_name, None)
    task, version = split_name(name, param)
    return Target(name, resolve(catalogue, task, version, param))


def split_name(name: str, param: str) -> tuple[str, int | None]:
    """`task` or `task@3` taken apart."""
    task, at, version = name.partition("@")
    if not task or (at and not _VERSION.fullmatch(version)):
        raise InvalidRequestError(
            f"{name!r}: expected a task, or a task and version as in e2e@3", param=param
        )
    return task, int(version) if at else None


def resolve(catalogue: Catalogue, task: str, version: int | None, param: str) -> TaskVersion:
    try:
        return catalogue.resolve(task, version)
    except UnknownModelError as error:
        raise UnknownModelError(error.message, param=error.param or param, code=error.code) from error


def _wanted(request: GenerationRequest, base_name: str) -> tuple[str | None, str]:
    """The task's name and the field it came in; None for the plain model."""
    model = None if request.model == base_name else request.model
    if request.task is None or model is None:
        return (request.task, "task") if request.task is not None else (model, "model")
    by_model, by_task = split_name(model, "model"), split_name(request.task, "task")
    versions = {by_model[1], by_task[1]} - {None}
    if by_model[0] != by_task[0] or len(versions) > 1:
        raise InvalidRequestError(
            f"'model' is {model!r} and 'task' is {request.task!r}: send one of them, "
            f"or {base_name!r} as 'model'",
            param="task",
        )
    return (model, "model") if by_task[1] is None else (request.task, "task")

"""How tasks and versions are written: `task` and `task@N`."""

import re

from adapter_registry.errors import InvalidRequestError, InvalidTaskNameError

_TASK = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_task(task: str) -> str:
    """`task` itself. Raises InvalidTaskNameError."""
    if not _TASK.fullmatch(task):
        raise InvalidTaskNameError(
            f"{task!r} is no task name: 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit",
            param="task",
        )
    return task


def parse_name(name: str) -> tuple[str, int | None]:
    """`task` or `task@N` taken apart. Raises InvalidTaskNameError, InvalidRequestError."""
    task, at, number = name.partition("@")
    check_task(task)
    if not at:
        return task, None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
        raise InvalidRequestError(
            f"{name!r}: after '@' comes a version number, as in {task}@1", param="version"
        )
    return task, int(number)

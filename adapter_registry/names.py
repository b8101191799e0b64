"""How tasks and versions are written: `task`, `task@N`, `task@alias`."""

import re

from adapter_registry.errors import InvalidRequestError, InvalidTaskNameError

VERSION = re.compile(r"[1-9][0-9]{0,8}")
ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
"""Begins with a letter: it is never taken for a version."""

PREVIOUS = "previous"
"""The alias that moves by itself, to what was the default before."""
RESERVED = (PREVIOUS, "latest")
"""Nobody sets these: an answer has to say what gave it, and "latest" says when."""

_TASK = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_task(task: str) -> str:
    """`task` itself. Raises InvalidTaskNameError."""
    if not _TASK.fullmatch(task):
        raise InvalidTaskNameError(
            f"{task!r} is no task name: 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit",
            param="task",
        )
    return task


def check_alias(name: str) -> str:
    """`name` itself, if an operator may set it. Raises InvalidRequestError."""
    if not ALIAS.fullmatch(name):
        raise InvalidRequestError(
            f"{name!r} is no alias: 1 to 32 of a-z, 0-9, '_', '-', beginning with a letter", param="alias"
        )
    if name in RESERVED:
        raise InvalidRequestError(
            f"nobody sets the alias {name!r}: 'previous' follows the routing by itself, and 'latest' would "
            "change what answers with every push; choose another name",
            param="alias",
        )
    return name


def parse_name(name: str) -> tuple[str, int | str | None]:
    """`task`, `task@N` or `task@alias` taken apart. Raises InvalidTaskNameError, InvalidRequestError."""
    task, at, which = name.partition("@")
    check_task(task)
    if not at:
        return task, None
    if VERSION.fullmatch(which):
        return task, int(which)
    if not ALIAS.fullmatch(which):
        raise InvalidRequestError(
            f"{name!r}: after '@' comes a version number, as in {task}@1, or an alias, as in {task}@canary",
            param="version",
        )
    return task, which

"""How a thread that computes shares the interpreter with an event loop in the same process."""

import sys

SWITCH_S = 0.0005
"""Python's own is ten times as long. A forward is hundreds of short calls that give the interpreter away;
after each it waits so long for it, at most, while the loop is at work."""


def share_interpreter() -> None:
    """For a process whose event loop sends or receives while a model computes."""
    sys.setswitchinterval(SWITCH_S)

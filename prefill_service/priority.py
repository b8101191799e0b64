"""How prompt passes share cores with a decode service on the same machine."""

import os
import sys
import threading


def step_back(nice: int) -> None:
    """Lowers the calling thread's priority, and that of the computing threads it will start.

    Linux only, where niceness belongs to a thread: elsewhere it would slow down the event loop, which passes
    the tokens on.
    """
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)

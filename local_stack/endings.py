"""How a child process ended, in words that lead to the cause."""

import signal

_HINTS = {
    signal.SIGKILL: "out of memory?",
    signal.SIGSEGV: "a fault in compiled code",
    signal.SIGBUS: "a fault in compiled code, or no room in shared memory or on the disk",
    signal.SIGILL: "an instruction that this CPU does not have",
    signal.SIGFPE: "a fault in compiled code",
    signal.SIGABRT: "compiled code gave up",
}


def described_end(status: int) -> str:
    """`status` as `subprocess` gives it: below zero a signal ended the process."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        killer = signal.Signals(-status)
    except ValueError:  # a real-time signal has a number only
        return f"ended: killed by signal {-status}"
    hint = _HINTS.get(killer)
    return f"ended: killed by {killer.name}" + (f" ({hint})" if hint else "")

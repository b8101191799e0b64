"""`python -m deploy.kernel_header [--check]`: writes the kernels' declarations for C++, or says whether
they are those of Python.

What the kernels are given is declared in `prad/lm/kernels/operations.py`; the header beside it is made of
that and committed, so that a compiler is all that building them takes.
"""

import difflib
import sys
from collections.abc import Sequence

from prad.lm.kernels import operations
from prad.lm.kernels.cpus import SOURCES
from prad.lm.kernels.declared import header

HEADER = SOURCES / "operations.h"
_SHOWN_LINES = 12


def check() -> list[str]:
    """Lines in which the committed header differs from what is declared."""
    committed = HEADER.read_text(encoding="utf-8").splitlines() if HEADER.is_file() else []
    declared = header(operations).splitlines()
    return list(difflib.unified_diff(committed, declared, "committed", "declared", n=0, lineterm=""))


def main(arguments: Sequence[str]) -> int:
    if list(arguments) not in ([], ["--check"]):
        print("usage: python -m deploy.kernel_header [--check]", file=sys.stderr)
        return 2
    if not arguments:
        HEADER.write_text(header(operations), encoding="utf-8")
        return 0
    if lines := check():
        print(*lines[:_SHOWN_LINES], sep="\n", file=sys.stderr)
        print(
            f"error: {HEADER.name} isn't what operations.py declares; write it again: "
            "python -m deploy.kernel_header",
            file=sys.stderr,
        )
        return 1
    print(f"{HEADER.name}: as generated from operations.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

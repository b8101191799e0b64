"""A product and a sum are rounded once where the kernels say so (and the CPU has an instruction for it), and
nowhere else: left to itself a compiler chooses for each loop, and the bits of a row would depend on how many
stand beside it."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from prad.lm.kernels.cpus import FLAGS, KINDS, SOURCES, CpuKind, compiler

HERE = [kind for kind in KINDS if kind.machine == platform.machine()]
FUSED = {
    "apart": ("return a * b + c;", False),
    "in_turn": ("for (int i = 0; i < 9; i++) c += a * b; return c;", False),
    "together": ("return fused(a, b, c);", True),
    "added": ("add_product(c, a, b); return c;", True),
}


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name)
def test_compilers_fuse_what_is_said_and_nothing_else(kind: CpuKind, tmp_path: Path) -> None:
    source = tmp_path / "some.cpp"
    bodies = [f'extern "C" v16 {name}(v16 a, v16 b, v16 c) {{ {body} }}' for name, (body, _) in FUSED.items()]
    source.write_text("\n".join(['#include "lanes.h"', *bodies]), encoding="utf-8")
    command = [compiler(), *FLAGS, *kind.flags, f"-I{SOURCES}", "-S", str(source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        pytest.skip(f"the compiler does not know {kind.name}: {done.stderr}")
    parts = re.split(rf"^({'|'.join(FUSED)}):.*$", done.stdout, flags=re.MULTILINE)[1:]
    found = {
        name: "fmadd" in code or "fmla" in code for name, code in zip(parts[::2], parts[1::2], strict=True)
    }
    assert found == {name: fused for name, (_, fused) in FUSED.items()}

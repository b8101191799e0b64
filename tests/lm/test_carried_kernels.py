"""The kernels that a wheel carries: which are taken, those that do not load, and how they are made."""

import logging
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from prad.lm.kernels import build, cpus, load_kernels
from prad.lm.kernels.cpus import (
    FLAGS,
    KINDS,
    SOURCES,
    CompileError,
    CpuKind,
    carried,
    compile_carried,
    compiler,
)
from tests.cache import CACHE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process looks for carried libraries, as on a common machine; none are there."""
    monkeypatch.setattr(cpus, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(cpus.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CXXFLAGS", raising=False)
    (tmp_path / "carried").mkdir()
    return tmp_path / "carried"


def test_a_cpu_takes_the_best_that_it_can_run(folder: Path) -> None:
    kinds = [kind for kind in KINDS if kind.machine == "x86_64"]
    for kind in kinds:
        kind.library.touch()
        assert kind.library.parent == folder
    for kind in kinds:
        assert carried(kind.needs) == kind.library
        assert carried(kind.needs | {"something_else"}) == kind.library
    assert carried(set()) is None, "a CPU without AVX2 has torch, or a compiler"
    better, lesser = kinds[0], kinds[1]
    better.library.unlink()
    assert carried(better.needs) == lesser.library


def test_an_installed_library_is_taken_and_nothing_compiled(folder: Path, tmp_path: Path) -> None:
    best = carried_name(folder)
    shutil.copy(build.built(CACHE), best)
    assert load_kernels("native", tmp_path / "cache", "cpu") is not None
    assert not (tmp_path / "cache").exists()


def test_one_that_does_not_load_stays_and_another_is_compiled(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = carried_name(folder)
    best.write_bytes(b"\x7fELF of a newer system")
    kept = build.built(CACHE)
    monkeypatch.setattr("prad.lm.kernels.built", lambda *_: kept)
    with caplog.at_level(logging.WARNING):
        assert load_kernels("native", tmp_path, "cpu") is not None
    assert best.exists(), "what is installed is not ours to remove"
    assert str(best) in caplog.text


def test_a_compiler_that_is_named_compiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried_name(folder).touch()
    assert build.installed() is not None
    monkeypatch.setenv("CXXFLAGS", "-g")
    assert build.installed() is None


def test_all_kinds_are_carried_or_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    script = '#!/bin/sh\nfor out; do :; done\ncase "$*" in *amx*) exit 1;; esac\necho library > "$out"\n'
    compiler.write_text(script, encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CompileError):
        compile_carried(tmp_path / "into")
    assert not (tmp_path / "into").exists()
    compiler.write_text(script.replace("exit 1", "true"), encoding="utf-8")
    compile_carried(tmp_path / "into")
    kinds = {f"{kind.name}.so" for kind in KINDS if kind.machine == "x86_64"}
    assert {path.name for path in (tmp_path / "into").iterdir()} == kinds


OTHERS = (  # that build their own
    CpuKind("avx-f16c", "x86_64", ("-march=x86-64-v2", "-mavx", "-mf16c")),
    CpuKind("avx-fma", "x86_64", ("-march=x86-64-v2", "-mavx", "-mfma")),
    CpuKind("avx512f-alone", "x86_64", ("-march=x86-64-v3", "-mavx512f")),
)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=pytest.mark.long if kind in OTHERS else ())
        for kind in (*KINDS, *OTHERS)
        if kind.machine == platform.machine()
    ],
)
def test_the_sources_are_right_for_every_kind(kind: CpuKind, tmp_path: Path) -> None:
    """The code of other CPUs is compiled by nothing else before an image is built."""
    (tmp_path / "nothing.cpp").touch()
    command = [compiler(), *FLAGS, *kind.flags, "-fsyntax-only"]
    known, done = (
        subprocess.run([*command, source], capture_output=True, text=True, encoding="utf-8")
        for source in (tmp_path / "nothing.cpp", SOURCES / "kernels.cpp")
    )
    if known.returncode:
        pytest.skip(f"the compiler does not know {kind.name}: {known.stderr}")
    assert done.returncode == 0, done.stderr


def carried_name(folder: Path) -> Path:
    """Where the library for this very CPU would be."""
    for kind in KINDS:
        (folder / f"{kind.name}.so").touch()
    found = carried(cpus.instructions())
    for kind in KINDS:
        (folder / f"{kind.name}.so").unlink()
    if found is None:
        pytest.skip("this CPU is of no kind that is carried")
    return found

"""What a result says of the machine that it was measured on."""

import os

import psutil
import pytest

from bench.record import setting


def test_cpus_that_may_not_be_used_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: list(range(os.cpu_count() or 1)))
    all_of_them = setting()["cpu"]
    assert all_of_them.startswith(f"{os.cpu_count()} x ")
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0])
    assert setting()["cpu"] == (f"1 of {all_of_them}" if os.cpu_count() != 1 else all_of_them)

"""What a result says of the machine that it was measured on."""

import os

import psutil
import pytest

from bench.record import setting


def test_cpus_that_may_not_be_used_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = setting()["cpu"]
    assert all_of_them.startswith(f"{os.cpu_count()} x ")
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [])
    assert setting()["cpu"] == f"0 of {all_of_them}"

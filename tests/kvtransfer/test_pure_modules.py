"""Schedulers import what prefill and decode say to each other: that brings neither gRPC nor torch along."""

import subprocess
import sys

import pytest

_LOADED = "import sys, {module}; print([m for m in ('grpc', 'torch', 'transformers') if m in sys.modules])"


@pytest.mark.parametrize(
    "module",
    [
        "kvtransfer",
        "kvtransfer.errors",
        "kvtransfer.messages",
        "kvtransfer.frames",
        "decode_service.scheduler",
    ],
)
def test_a_pure_module_loads_nothing_heavy(module: str) -> None:
    code = _LOADED.format(module=module)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert ended.stdout.strip() == "[]"

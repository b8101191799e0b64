"""What is called pure is: a fresh interpreter that imports it has loaded none of the heavy libraries."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    ["decode_service", "decode_service.reservations", "decode_service.scheduler", "decode_service.engine"],
)
def test_importing_policy_loads_neither_torch_nor_grpc(module: str) -> None:
    assert loaded_by(module) <= loaded_by("kvtransfer") & {"grpc"}


def test_the_face_of_the_service_needs_no_model() -> None:
    assert loaded_by("decode_service.service") == {"grpc"}


def loaded_by(module: str) -> set[str]:
    script = f"import sys, {module}; print(*{{'torch', 'transformers', 'grpc'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    return set(done.stdout.split())

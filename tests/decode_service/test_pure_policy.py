"""What is called pure is: a fresh interpreter that imports it has loaded none of the heavy libraries."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "grpc")


@pytest.mark.parametrize(
    "module",
    ["decode_service", "decode_service.sequences", "decode_service.scheduler", "decode_service.protocol"],
)
def test_importing_policy_loads_neither_torch_nor_grpc(module: str) -> None:
    script = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_face_of_the_service_needs_no_model() -> None:
    script = "import sys, decode_service.service; print([m for m in ('torch',) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

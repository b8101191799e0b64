"""What is called pure is: a fresh interpreter that imports it has loaded none of the heavy libraries."""

import subprocess
import sys

import pytest

NOTHING, GRPC = "", "grpc"

LOADED = {
    "prad.core.kv": NOTHING,
    "prad.core.models": NOTHING,
    "prad.core.sampling": NOTHING,
    "prad.core.search": NOTHING,
    "adapter_registry.planning": NOTHING,
    "adapter_registry.routing": NOTHING,
    "kvtransfer": NOTHING,
    "kvtransfer.errors": NOTHING,
    "kvtransfer.messages": NOTHING,
    "kvtransfer.frames": NOTHING,
    "decode_service": NOTHING,
    "decode_service.settings": NOTHING,
    "decode_service.reservations": NOTHING,
    "decode_service.scheduler": NOTHING,
    "decode_service.beams": NOTHING,
    "decode_service.engine": NOTHING,
    "decode_service.service": GRPC,
    "prefill_service.settings": NOTHING,
    "prefill_service.prompt": NOTHING,
    "prefill_service.scheduler": NOTHING,
    "prefill_service.catalogue": NOTHING,
    "prefill_service.follower": NOTHING,
    "prefill_service.beams": NOTHING,
    "prefill_service.pass_loop": GRPC,
    "prefill_service.engine": GRPC,
}
"""Which of the heavy ones each brings along."""


@pytest.mark.parametrize("module", LOADED)
def test_a_pure_module_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*{{'torch', 'transformers', 'grpc'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == LOADED[module]

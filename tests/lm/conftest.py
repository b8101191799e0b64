"""The kernels as another CPU has them."""

from collections.abc import Callable

import pytest

from prad.lm.kernels import Kernels
from prad.lm.kernels.build import built
from tests.cache import CACHE


@pytest.fixture(scope="session")
def kernels_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernels]:
    """As a CPU of that kind has them; this one must know its instructions."""

    def build(kind: str) -> Kernels:
        compiler = tmp_path_factory.mktemp(kind) / "cxx"
        compiler.write_text(f'#!/bin/sh\nexec g++ "$@" -march={kind}\n', encoding="utf-8")
        compiler.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", str(compiler))
            return Kernels(built(CACHE / kind), 2)

    return build

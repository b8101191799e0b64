"""The kernels as another CPU has them."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from prad.lm.kernels import Kernels
from prad.lm.kernels.build import built
from tests.cache import CACHE


@pytest.fixture(scope="session")
def kernels_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernels]:
    """As a CPU of that kind has them; this one must know its instructions."""

    @cache
    def build(kind: str) -> Kernels:
        compiler = tmp_path_factory.mktemp(kind) / "cxx"
        compiler.write_text(f'#!/bin/sh\nexec g++ "$@" -march={kind}\n', encoding="utf-8")
        compiler.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", str(compiler))
            return Kernels(built(CACHE / kind), 2)

    return build


@pytest.fixture
def kernels(
    request: pytest.FixtureRequest, kernels: Kernels, kernels_of: Callable[[str], Kernels]
) -> Kernels:
    """This CPU's, or those of a lesser one where a test asks for them (`near.EACH_KIND`)."""
    kind = getattr(request, "param", "own")
    return kernels if kind == "own" else kernels_of(kind)


@pytest.fixture(params=["as they are", "as zeros"])
def denormals(request: pytest.FixtureRequest) -> Iterator[None]:
    """How the caller's thread computes with them; the kernels' others as they come."""
    assert torch.set_flush_denormal(request.param == "as zeros")
    yield
    torch.set_flush_denormal(False)

"""Fixtures of the decode tests: a served tiny model, and a client that hands over to it."""

from collections.abc import AsyncIterator

import pytest
from handing_over import Prefill, decode_settings, gpt2, llama, prefilling

from decode_service.server import DecodeServer, serving
from prad.lm import LanguageModel


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return llama()


@pytest.fixture(scope="session", params=[llama, gpt2], ids=["llama", "gpt2"])
def each_model(request: pytest.FixtureRequest) -> LanguageModel:
    built: LanguageModel = request.param()
    return built


@pytest.fixture
async def server(model: LanguageModel) -> AsyncIterator[DecodeServer]:
    async with serving(decode_settings(), model) as running:
        yield running


@pytest.fixture
async def prefill(model: LanguageModel, server: DecodeServer) -> AsyncIterator[Prefill]:
    async with prefilling(model, server.port) as client:
        yield client

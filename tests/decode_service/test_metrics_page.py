"""Who may read decode's metrics: no web page that got itself a name for this machine."""

import httpx
import pytest
from prometheus_client import CollectorRegistry

from decode_service.server import served


def asked(listening: str, port: int, host: str) -> int:
    with served(CollectorRegistry(), listening, port):
        return httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"host": host}).status_code


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8002", "desk", "[::1]:8002"])
def test_names_of_this_machine_are_answered(unused_tcp_port: int, host: str) -> None:
    assert asked("127.0.0.1", unused_tcp_port, host) == 200


@pytest.mark.parametrize("host", ["evil.example", "EVIL.example:8002", "[x", ""])
def test_other_names_are_refused_on_loopback(unused_tcp_port: int, host: str) -> None:
    assert asked("127.0.0.1", unused_tcp_port, host) == 403


def test_beyond_loopback_it_has_whatever_name_its_network_gives_it(unused_tcp_port: int) -> None:
    assert asked("0.0.0.0", unused_tcp_port, "decode.team.example:8002") == 200

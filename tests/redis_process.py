"""A real redis-server for tests: started on a socket of its own, killed, started again on the same data."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, ConnectionError

REQUIRED = "PRAD_REQUIRE_REDIS"
_START_S = 60.0


def binary() -> str:
    """Skips the test, loudly, where there is none; fails it where one is required."""
    found = shutil.which("redis-server")
    if found is None:
        reason = (
            "NOT RUN: there is no redis-server here, so the registry on Redis was not tested; install one "
            f"(Debian: apt-get install redis-server). {REQUIRED}=1 makes this a failure"
        )
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


LASTING = ("--appendonly", "yes", "--appendfsync", "always")


class RedisProcess:
    """`folder` keeps its data and its socket, whose path must be short. `options`: of redis-server."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options or LASTING
        self._socket = folder / "s"
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        at = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder), "--save", ""]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen([binary(), *at, *self._options], stdout=log, stderr=log)
        by = time.monotonic() + _START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > by:
                self.kill()
                pytest.fail(f"no redis-server: {(self._folder / 'log').read_text(encoding='utf-8')}")
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def empty(self) -> None:
        with Redis.from_url(self.url) as client:
            client.flushall()

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url) as client:
                return bool(client.ping())
        except AuthenticationError:  # it answers, and asks for a password
            return True
        except ConnectionError:
            return False


class SentinelProcess:
    """One that watches the master at `port` of this machine, as "prad", and alone decides that it is down."""

    def __init__(self, folder: Path, own_port: int, port: int) -> None:
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {own_port}\ndir {folder}\nsentinel monitor prad 127.0.0.1 {port} 1\n"
            "sentinel down-after-milliseconds prad 400\nsentinel failover-timeout prad 20000\n",
            encoding="utf-8",
        )
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen([binary(), str(config), "--sentinel"], stdout=log, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

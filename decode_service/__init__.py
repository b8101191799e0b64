"""Decoding without adapters: KV caches come in, all tasks' sequences run in one batch, tokens go back."""

from decode_service.errors import BindError, CacheTooSmallError, DecodeError
from decode_service.server import DecodeServer, load, run, serving
from decode_service.settings import DecodeSettings

__all__ = [
    "BindError",
    "CacheTooSmallError",
    "DecodeError",
    "DecodeServer",
    "DecodeSettings",
    "load",
    "run",
    "serving",
]

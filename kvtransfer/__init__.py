"""The contract between prefill and decode: how a KV cache travels, and how tokens come back."""

from kvtransfer.client import DecodeClient
from kvtransfer.errors import (
    CorruptError,
    FencedError,
    LostError,
    ProtocolError,
    RejectedError,
    RejectReason,
    TimedOutError,
    TransferError,
)
from kvtransfer.layout import LayerSpec, ModelSpec
from kvtransfer.messages import (
    Cancel,
    Description,
    Open,
    RequestState,
    Sampling,
    Token,
    TokenEvent,
    TokenFrame,
)
from kvtransfer.sender import HandOff
from kvtransfer.settings import TransferSettings
from kvtransfer.token_stream import TokenStream

__all__ = [
    "Cancel",
    "CorruptError",
    "DecodeClient",
    "Description",
    "FencedError",
    "HandOff",
    "LayerSpec",
    "LostError",
    "ModelSpec",
    "Open",
    "ProtocolError",
    "RejectReason",
    "RejectedError",
    "RequestState",
    "Sampling",
    "TimedOutError",
    "Token",
    "TokenEvent",
    "TokenFrame",
    "TokenStream",
    "TransferError",
    "TransferSettings",
]

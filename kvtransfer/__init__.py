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
from kvtransfer.hand_off_stream import send_layer
from kvtransfer.layout import Encoding
from kvtransfer.messages import (
    Cancel,
    Description,
    Open,
    StateSite,
    TokenFrame,
)
from kvtransfer.sender import HandOff, PassRows
from kvtransfer.settings import TransferSettings
from kvtransfer.token_stream import TokenStream

__all__ = [
    "Cancel",
    "CorruptError",
    "DecodeClient",
    "Description",
    "Encoding",
    "FencedError",
    "HandOff",
    "LostError",
    "Open",
    "PassRows",
    "ProtocolError",
    "RejectReason",
    "RejectedError",
    "StateSite",
    "TimedOutError",
    "TokenFrame",
    "TokenStream",
    "TransferError",
    "TransferSettings",
    "send_layer",
]

"""What keeps a decode service from starting; what can go wrong with a request is kvtransfer's tree."""


class DecodeError(Exception):
    """Base of everything `decode_service` raises on purpose."""


class BindError(DecodeError):
    """The address cannot be listened on."""


class CacheTooSmallError(DecodeError):
    """The KV cache of the settings does not hold a single block."""

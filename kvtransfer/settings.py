"""Limits and timeouts of the transfer; each part receives this one frozen object."""

from dataclasses import dataclass

_CONNECT_TIMEOUT_MS = 1_000  # gRPC takes the shortest back-off as the shortest connect timeout as well
_SHORTEST_KEEPALIVE_MS = 100  # a server takes more pings than that for an attack
_SERVER_KEEPALIVE_MS, _SERVER_PING_TIMEOUT_MS = 5_000, 5_000  # nobody waits for a client that is gone


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Times in seconds, sizes in bytes.

    A KV frame is sent when it has reached `frame_bytes`; `max_message_bytes` bounds every message on both
    ends. `shared_bytes` is the size of the shared memory that is offered to a decode service of the same host
    (0: none). `silence_s`: so long after its last sign of life the requests of a decode service that is
    frozen, or whose host is gone without a word, count as lost; after two thirds of it the connection does,
    and is made anew (`reattach_s`). gRPC's own threads answer its pings, so a busy service does.
    `open_timeout_s` and `answer_timeout_s`, of an Open and of a question after sequences, find a service
    whose threads live and which does nothing. Decode keeps a detached client's sequences much longer.
    """

    describe_timeout_s: float = 5.0
    open_timeout_s: float = 10.0
    send_timeout_s: float = 30.0
    commit_timeout_s: float = 10.0
    abort_timeout_s: float = 2.0
    answer_timeout_s: float = 10.0
    attach_timeout_s: float = 5.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 0.25
    silence_s: float = 3.0
    frame_bytes: int = 4 << 20
    shared_bytes: int = 16 << 20
    max_message_bytes: int = 16 << 20
    acknowledge_every: int = 16

    @property
    def reattach_s(self) -> float:
        """How long a token stream tries at least to come back; until `silence_s` after its last frame if that
        is later: a connection that broke off at once leaves it most of that time."""
        return self.silence_s / 3

    def channel_options(self) -> list[tuple[str, int]]:
        """gRPC options of a client."""
        keepalive_ms = int((self.silence_s - self.reattach_s) * 1000 / 3)
        ping_timeout_ms = 2 * keepalive_ms
        return [
            *_message_options(self.max_message_bytes),
            ("grpc.keepalive_time_ms", keepalive_ms),
            ("grpc.keepalive_timeout_ms", ping_timeout_ms),
            ("grpc.http2.ping_timeout_ms", ping_timeout_ms),  # of any ping: gRPC's own waits a minute
            ("grpc.http2.max_pings_without_data", 0),
            # a decode service that came back is found within our own back-off, not gRPC's of two minutes
            ("grpc.initial_reconnect_backoff_ms", int(self.backoff_first_s * 1000)),
            ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
            ("grpc.max_reconnect_backoff_ms", int(self.backoff_max_s * 1000)),
            ("grpc.enable_http_proxy", 0),
            # a container that was started anew has a new address behind its name
            ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ]

    def server_options(self) -> list[tuple[str, int]]:
        """gRPC options of a server: as large messages, and a port that is refused when it is taken."""
        return [
            *_message_options(self.max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", _SERVER_KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _SERVER_PING_TIMEOUT_MS),
            ("grpc.http2.ping_timeout_ms", _SERVER_PING_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", _SHORTEST_KEEPALIVE_MS),
        ]


def _message_options(limit: int) -> list[tuple[str, int]]:
    return [("grpc.max_send_message_length", limit), ("grpc.max_receive_message_length", limit)]

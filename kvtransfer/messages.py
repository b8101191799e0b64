"""What prefill and decode tell each other, as frozen dataclasses over prad.core's, and how they are written
on the wire: to protobuf and back by their fields' names, so that nothing is named here a second time.

A dataclass travels as the message of its own name (`SamplingParams` as `pb.SamplingParams`), each of its
fields in the field of the same name. What may stand in a field:

    int, float, str, bytes, bool      as it is; an int in a fixed64 keeps its lowest 64 bits (a negative seed)
    X | None                          an optional field; None: absent
    a dataclass                       the message of its name
    tuple[X, ...], frozenset[X]       a repeated field; of a set sorted
    tuple[tuple[A, B], ...]           a message with a repeated field for each column, in their order

For each class two functions are written as Python source when it is first used, as `dataclass` writes its
`__init__`: a frame of tokens costs what it would by hand. A message may have fields that the dataclass has
not (a hand-off's number on its stream). Neither gRPC nor torch: schedulers import this.

HandOffFrames are written and read past protobuf's objects, with KV bytes copied once on their way in and not
at all on their way out. The bytes are protobuf's own, as the proto says: whoever has its generated code reads
and writes them, too. Ours leaves out what a message object costs: a copy of the bytes into it, one for each
message around it, and one as it is serialised; and as many the other way. A message whose last field is long
needs none: what stands before it is serialised without, and its bytes follow.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, lru_cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import ModelSpec
from prad.core.rules import Before
from prad.core.sampling import SamplingParams, TokenEvent
from prad.core.search import Beams

T = TypeVar("T")

_SCALARS = {int, float, str, bytes, bool}
_FRAMES = pb.HandOffFrames.DESCRIPTOR.fields_by_name["frames"].number
_KV = pb.HandOffFrame.DESCRIPTOR.fields_by_name["kv"].number
_DATA = pb.KV.DESCRIPTOR.fields_by_name["data"].number
_VARINT, _EIGHT_BYTES, _SIZED = 0, 1, 2  # protobuf's wire types
_MOST_VARINT_BYTES = 10
_MOST_STEPS = 256  # frames of a message, and fields of a KV frame: of more, protobuf's reader costs less
_OTHERWISE = "written by somebody else, or no message at all: protobuf's own reader tells which"
_SAME_EACH_TIME = {ModelSpec}  # every Open of a burst names the same model: it is written and read once


@dataclass(frozen=True, slots=True)
class StateSite:
    """A site of the model at which a request brings a vector [width] per layer (request state)."""

    site: str
    width: int


@dataclass(frozen=True, slots=True)
class Open:
    """A request for room: everything decode must know before KV bytes move.

    request_id names one prompt (an HTTP request with several prompts hands each over under its own id); it is
    the client's own: another client may use the same. kv_len counts the tokens in the KV cache (virtual
    prefix, prompt, continuation), prompt_len the prompt's alone; decode feeds the first token at position
    next_position. output_offset is the output index of that first token. timeout_ms: what is left of the
    request's time, because two hosts' clocks differ; None: it may take for ever. state: the request state
    that will come before Commit. tokens_per_event: how many tokens of a sequence are told at once, at most; 1
    is each when it is drawn. before: for `sampling.rules`, None without. beams: the choices are the best of a
    beam search, told once it is over; Commit then has the prompt's first candidates instead of first tokens,
    as the `top` of a single one.
    """

    request_id: str
    model: ModelSpec
    kv_len: int
    prompt_len: int
    next_position: int
    sampling: SamplingParams
    attempt: int = 1
    choices: int = 1
    prompt_index: int = 0
    output_offset: int = 0
    timeout_ms: int | None = None
    state: tuple[StateSite, ...] = ()
    tokens_per_event: int = 1
    before: Before | None = None
    beams: Beams | None = None

    @property
    def sequences(self) -> int:
        """How many decode together."""
        return self.choices if self.beams is None else self.beams.width

    def site_bytes(self, site: str) -> int:
        """Bytes of the request state at one site, all layers. Raises KeyError for an unannounced one."""
        widths = {announced.site: announced.width for announced in self.state}
        return len(self.model.layout.layers) * widths[site] * self.model.layout.item_bytes

    @property
    def state_bytes(self) -> int:
        return sum(self.site_bytes(announced.site) for announced in self.state)


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """All of a client's events of one decode step; `number` counts up by 1 from 1."""

    number: int
    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client wants no more of a request's attempt: of one choice, or (None) of all."""

    request_id: str
    attempt: int
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Whether decode still has these sequences, each a (request_id, attempt, choice)."""

    sequences: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Description:
    """Which model a decode service serves, and how full it is."""

    model: ModelSpec
    block_size: int
    total_blocks: int
    free_blocks: int
    max_sequences: int


def encode(value: Any) -> Any:
    """The message of a dataclass. Raises ValueError for a number that its field cannot hold."""
    kind: Any = type(value)
    return _encoder(kind)(value)


def decode(kind: type[T], message: Any) -> T:
    """The dataclass of its message. Raises ValueError if the class refuses what is in it."""
    of_kind: Any = kind
    decoded: T = _decoder(of_kind)(message)
    return decoded


@cache
def _encoder(kind: type) -> Callable[[Any], Any]:
    """Raises TypeError if the message lacks a field, or can't hold one."""
    names: dict[str, Any] = {"Message": getattr(pb, kind.__name__)}
    values = [f"{f.name}={_outward(hint, f, f'value.{f.name}', names)}" for hint, f in _plan(kind)]
    encoder: Callable[[Any], Any] = eval(f"lambda value: Message({', '.join(values)})", names)
    return lru_cache(maxsize=8)(encoder) if kind in _SAME_EACH_TIME else encoder


@cache
def _decoder(kind: type) -> Callable[[Any], Any]:
    """Raises TypeError as `_encoder`."""
    names: dict[str, Any] = {"Kind": kind}
    values = [f"{f.name}={_inward(hint, f, f'message.{f.name}', names)}" for hint, f in _plan(kind)]
    decoder: Callable[[Any], Any] = eval(f"lambda message: Kind({', '.join(values)})", names)
    if kind not in _SAME_EACH_TIME:
        return decoder
    from_bytes = lru_cache(maxsize=8)(lambda data: decoder(getattr(pb, kind.__name__).FromString(data)))
    return lambda message: from_bytes(message.SerializeToString(deterministic=True))


def _plan(kind: type) -> list[tuple[Any, Any]]:
    """The type of each field, and the message's field of the same name."""
    if not is_dataclass(kind):
        raise TypeError(f"{kind.__name__} is no dataclass")
    message = getattr(pb, kind.__name__).DESCRIPTOR
    hints, known = get_type_hints(kind), message.fields_by_name
    missing = [f.name for f in fields(kind) if f.name not in known]
    if missing:
        raise TypeError(f"the message {message.name} has no {', '.join(missing)}")
    return [(hints[f.name], known[f.name]) for f in fields(kind)]


def _outward(hint: Any, field: Any, value: str, names: dict[str, Any]) -> str:
    """The source of what `value` becomes in the message; what it calls goes into `names`."""
    hint, optional = _without_none(hint)
    inner = get_args(hint)
    if field.type == field.TYPE_FIXED64:
        source = f"{value} & {2**64 - 1}"
    elif hint in _SCALARS:
        return value  # protobuf takes None for absent
    elif is_dataclass(hint):
        source = f"{_named(_encoder(hint), names)}({value})"  # type: ignore[arg-type]
    elif get_origin(hint) is frozenset:
        source = f"sorted({value})"
    elif _is_columns(hint):
        message = _named(field.message_type._concrete_class, names)
        columns = [
            f"{column.name}=[row[{i}] for row in {value}]"
            for i, column in enumerate(field.message_type.fields)
        ]
        source = f"{message}({', '.join(columns)}) if {value} else None"
    elif get_origin(hint) is tuple and inner[-1] is Ellipsis:
        each = _outward(inner[0], field, "each", names)
        source = value if each == "each" else f"[{each} for each in {value}]"
    else:
        raise TypeError(f"no message holds {hint}")
    return f"None if {value} is None else {source}" if optional else source


def _inward(hint: Any, field: Any, value: str, names: dict[str, Any]) -> str:
    """The source of what the message's `value` becomes."""
    hint, optional = _without_none(hint)
    inner = get_args(hint)
    if hint in _SCALARS:
        source = value
    elif is_dataclass(hint):
        source = f"{_named(_decoder(hint), names)}({value})"  # type: ignore[arg-type]
    elif get_origin(hint) is frozenset:
        source = f"frozenset({value})"
    elif _is_columns(hint):
        columns = [f"{value}.{column.name}" for column in field.message_type.fields]
        source = f"tuple(zip({', '.join(columns)})) if message.HasField({field.name!r}) else ()"
    elif get_origin(hint) is tuple and inner[-1] is Ellipsis:
        each = _inward(inner[0], field, "each", names)
        source = f"tuple({value})" if each == "each" else f"tuple([{each} for each in {value}])"
    else:
        raise TypeError(f"no message holds {hint}")
    return f"{source} if message.HasField({field.name!r}) else None" if optional else source


def _is_columns(hint: Any) -> bool:
    inner = get_args(hint)
    return get_origin(hint) is tuple and inner[-1] is Ellipsis and get_origin(inner[0]) is tuple


def _named(function: Any, names: dict[str, Any]) -> str:
    name = f"call_{len(names)}"
    names[name] = function
    return name


def _without_none(hint: Any) -> tuple[Any, bool]:
    """(X, True) of X | None, (X, False) of X."""
    if get_origin(hint) is not UnionType:
        return hint, False
    (one,) = (kind for kind in get_args(hint) if kind is not NoneType)
    return one, True


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it came. data: a KV frame's bytes, which are then not in `message`; None for any other."""

    message: pb.HandOffFrame
    data: memoryview | None = None


def with_data(frames: pb.HandOffFrames, kv: pb.KV, chunks: Sequence[memoryview], size: int) -> bytes:
    """`frames` and behind them a KV frame: `kv`, and its bytes, `size` altogether, in pieces."""
    inner = kv.SerializeToString() + _start(_DATA, size)
    frame = _start(_KV, len(inner) + size) + inner
    return b"".join((frames.SerializeToString(), _start(_FRAMES, len(frame) + size), frame, *chunks))


def frames_of(message: bytes) -> Iterable[Frame]:
    """The frames of a HandOffFrames message. Raises protobuf's DecodeError if it is none."""
    whole = memoryview(message)
    found, at = list[Frame](), 0
    try:
        while at < len(whole):
            if len(found) == _MOST_STEPS:
                raise ValueError(_OTHERWISE)
            start, end = _sized(whole, at, _FRAMES)
            found.append(_frame(whole[start:end]))
            at = end
    except ValueError:  # one at a time: whoever reads them may refuse the first
        return map(Frame, pb.HandOffFrames.FromString(message).frames)
    return found


def _frame(written: memoryview) -> Frame:
    try:
        start, end = _sized(written, 0, _KV)
        if end != len(written):
            raise ValueError(_OTHERWISE)
        kv = written[start:end]
        at = _data_start(kv)
    except ValueError:
        return Frame(pb.HandOffFrame.FromString(written))
    start, end = _sized(kv, at, _DATA)
    head = pb.KV.FromString(kv[:at])
    if head.WhichOneof("payload") is not None:  # of two the last one counts
        return Frame(pb.HandOffFrame.FromString(written))
    return Frame(pb.HandOffFrame(kv=head), kv[start:end])


def _data_start(kv: memoryview) -> int:
    """Where the field of the bytes begins, which is the last one."""
    at = 0
    for _ in range(_MOST_STEPS):
        key, after = _varint(kv, at)
        number, kind = key >> 3, key & 7
        if kind == _SIZED:
            _, end = _sized(kv, at, number)
            if number == _DATA:
                if end != len(kv):
                    break
                return at
            at = end
        elif kind == _EIGHT_BYTES:
            at = after + 8
        elif kind == _VARINT:
            _, at = _varint(kv, after)
        else:
            break
    raise ValueError(_OTHERWISE)


def _start(number: int, size: int) -> bytes:
    """What stands before a field of `size` bytes."""
    return bytes((*_as_varint(number << 3 | _SIZED), *_as_varint(size)))


def _sized(written: memoryview, at: int, number: int) -> tuple[int, int]:
    """Start and end of what the field of bytes at `at` holds, which must be number `number`."""
    key, at = _varint(written, at)
    size, start = _varint(written, at)
    if key != number << 3 | _SIZED or start + size > len(written):
        raise ValueError(_OTHERWISE)
    return start, start + size


def _varint(written: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = 0
    for index, byte in enumerate(written[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(_OTHERWISE)


def _as_varint(value: int) -> list[int]:
    written = []
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return [*written, value]

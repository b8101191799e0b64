from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RAW: _ClassVar[Encoding]
    INT8: _ClassVar[Encoding]
RAW: Encoding
INT8: Encoding

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("model", "block_size", "total_blocks", "free_blocks", "max_sequences")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    model: ModelSpec
    block_size: int
    total_blocks: int
    free_blocks: int
    max_sequences: int
    def __init__(self, model: _Optional[_Union[ModelSpec, _Mapping]] = ..., block_size: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., max_sequences: _Optional[int] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("fingerprint", "layout")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    layout: KVLayout
    def __init__(self, fingerprint: _Optional[str] = ..., layout: _Optional[_Union[KVLayout, _Mapping]] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("layers", "dtype")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerKV]
    dtype: str
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerKV, _Mapping]]] = ..., dtype: _Optional[str] = ...) -> None: ...

class LayerKV(_message.Message):
    __slots__ = ("heads", "key_dim", "value_dim")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    heads: int
    key_dim: int
    value_dim: int
    def __init__(self, heads: _Optional[int] = ..., key_dim: _Optional[int] = ..., value_dim: _Optional[int] = ...) -> None: ...

class HandOffFrames(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[HandOffFrame]
    def __init__(self, frames: _Optional[_Iterable[_Union[HandOffFrame, _Mapping]]] = ...) -> None: ...

class HandOffFrame(_message.Message):
    __slots__ = ("open", "kv", "commit", "abort", "segment", "state", "begin")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    open: Open
    kv: KV
    commit: Commit
    abort: Abort
    segment: Segment
    state: State
    begin: Begin
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., kv: _Optional[_Union[KV, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ..., state: _Optional[_Union[State, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("request_id", "attempt", "model", "kv_len", "prompt_len", "next_position", "choices", "prompt_index", "output_offset", "sampling", "timeout_ms", "state", "hand_off", "tokens_per_event", "before", "beams")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_LEN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_EVENT_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    model: ModelSpec
    kv_len: int
    prompt_len: int
    next_position: int
    choices: int
    prompt_index: int
    output_offset: int
    sampling: SamplingParams
    timeout_ms: int
    state: _containers.RepeatedCompositeFieldContainer[StateSite]
    hand_off: int
    tokens_per_event: int
    before: Before
    beams: Beams
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., model: _Optional[_Union[ModelSpec, _Mapping]] = ..., kv_len: _Optional[int] = ..., prompt_len: _Optional[int] = ..., next_position: _Optional[int] = ..., choices: _Optional[int] = ..., prompt_index: _Optional[int] = ..., output_offset: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., state: _Optional[_Iterable[_Union[StateSite, _Mapping]]] = ..., hand_off: _Optional[int] = ..., tokens_per_event: _Optional[int] = ..., before: _Optional[_Union[Before, _Mapping]] = ..., beams: _Optional[_Union[Beams, _Mapping]] = ...) -> None: ...

class Beams(_message.Message):
    __slots__ = ("width", "length_penalty", "early_stopping")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    width: int
    length_penalty: float
    early_stopping: bool
    def __init__(self, width: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[bool] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop_ids", "logprobs", "rules")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    min_tokens: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    rules: Rules
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., rules: _Optional[_Union[Rules, _Mapping]] = ...) -> None: ...

class Rules(_message.Message):
    __slots__ = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_ids", "grammar")
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: LogitBias
    bad_words: _containers.RepeatedCompositeFieldContainer[Word]
    allowed_ids: _containers.RepeatedScalarFieldContainer[int]
    grammar: str
    def __init__(self, presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Union[LogitBias, _Mapping]] = ..., bad_words: _Optional[_Iterable[_Union[Word, _Mapping]]] = ..., allowed_ids: _Optional[_Iterable[int]] = ..., grammar: _Optional[str] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("id", "bias")
    ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    id: _containers.RepeatedScalarFieldContainer[int]
    bias: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[_Iterable[int]] = ..., bias: _Optional[_Iterable[float]] = ...) -> None: ...

class Word(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Before(_message.Message):
    __slots__ = ("prompt_ids", "output_ids")
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompt_ids: _Optional[_Iterable[int]] = ..., output_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StateSite(_message.Message):
    __slots__ = ("site", "width")
    SITE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    site: str
    width: int
    def __init__(self, site: _Optional[str] = ..., width: _Optional[int] = ...) -> None: ...

class State(_message.Message):
    __slots__ = ("hand_off", "site", "data", "checksum")
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    hand_off: int
    site: str
    data: bytes
    checksum: int
    def __init__(self, hand_off: _Optional[int] = ..., site: _Optional[str] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class KV(_message.Message):
    __slots__ = ("first_layer", "layer_count", "rows", "encoding", "checksum", "data", "place")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    layer_count: int
    rows: _containers.RepeatedCompositeFieldContainer[Rows]
    encoding: Encoding
    checksum: int
    data: bytes
    place: Place
    def __init__(self, first_layer: _Optional[int] = ..., layer_count: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[Rows, _Mapping]]] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ..., place: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("hand_off", "first_token", "token_count")
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    hand_off: int
    first_token: int
    token_count: int
    def __init__(self, hand_off: _Optional[int] = ..., first_token: _Optional[int] = ..., token_count: _Optional[int] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("offset", "size")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    offset: int
    size: int
    def __init__(self, offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("hand_off", "first_tokens", "total_bytes", "text_ids", "alike")
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    ALIKE_FIELD_NUMBER: _ClassVar[int]
    hand_off: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[Token]
    total_bytes: int
    text_ids: _containers.RepeatedScalarFieldContainer[int]
    alike: int
    def __init__(self, hand_off: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., total_bytes: _Optional[int] = ..., text_ids: _Optional[_Iterable[int]] = ..., alike: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("hand_off", "reason")
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    hand_off: int
    reason: str
    def __init__(self, hand_off: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class HandOffReplies(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[HandOffReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[HandOffReply, _Mapping]]] = ...) -> None: ...

class HandOffReply(_message.Message):
    __slots__ = ("hand_off", "accepted", "rejected", "committed", "aborted", "failed", "mapped", "taken")
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    MAPPED_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    hand_off: int
    accepted: Accepted
    rejected: Rejected
    committed: Committed
    aborted: Aborted
    failed: Failed
    mapped: Mapped
    taken: Taken
    def __init__(self, hand_off: _Optional[int] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., mapped: _Optional[_Union[Mapped, _Mapping]] = ..., taken: _Optional[_Union[Taken, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("reason", "message", "retry_after_ms")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Rejected.Reason]
        FULL: _ClassVar[Rejected.Reason]
        TOO_LARGE: _ClassVar[Rejected.Reason]
        WRONG_MODEL: _ClassVar[Rejected.Reason]
        FENCED: _ClassVar[Rejected.Reason]
        INVALID: _ClassVar[Rejected.Reason]
        DRAINING: _ClassVar[Rejected.Reason]
        UNSUPPORTED: _ClassVar[Rejected.Reason]
        NOT_ATTACHED: _ClassVar[Rejected.Reason]
    REASON_UNSPECIFIED: Rejected.Reason
    FULL: Rejected.Reason
    TOO_LARGE: Rejected.Reason
    WRONG_MODEL: Rejected.Reason
    FENCED: Rejected.Reason
    INVALID: Rejected.Reason
    DRAINING: Rejected.Reason
    UNSUPPORTED: Rejected.Reason
    NOT_ATTACHED: Rejected.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: Rejected.Reason
    message: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[_Union[Rejected.Reason, str]] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Aborted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Mapped(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    def __init__(self, frames: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("status", "message")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    status: int
    message: str
    def __init__(self, status: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class TokenControl(_message.Message):
    __slots__ = ("attach", "acknowledge", "cancel", "ask")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    acknowledge: Acknowledge
    cancel: Cancel
    ask: Ask
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., acknowledge: _Optional[_Union[Acknowledge, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("client_id", "session", "received")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    received: int
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., received: _Optional[int] = ...) -> None: ...

class Acknowledge(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: int
    def __init__(self, frame: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "attempt", "choice")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    choice: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., choice: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: Sequences
    def __init__(self, sequences: _Optional[_Union[Sequences, _Mapping]] = ...) -> None: ...

class Sequences(_message.Message):
    __slots__ = ("request_id", "attempt", "choice")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    request_id: _containers.RepeatedScalarFieldContainer[str]
    attempt: _containers.RepeatedScalarFieldContainer[int]
    choice: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[_Iterable[str]] = ..., attempt: _Optional[_Iterable[int]] = ..., choice: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenReply(_message.Message):
    __slots__ = ("attached", "frame", "ended")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    frame: TokenFrame
    ended: Ended
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., frame: _Optional[_Union[TokenFrame, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Attached(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class TokenFrame(_message.Message):
    __slots__ = ("number", "events")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    events: _containers.RepeatedCompositeFieldContainer[TokenEvent]
    def __init__(self, number: _Optional[int] = ..., events: _Optional[_Iterable[_Union[TokenEvent, _Mapping]]] = ...) -> None: ...

class TokenEvent(_message.Message):
    __slots__ = ("request_id", "attempt", "choice", "index", "tokens", "finish_reason", "error", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    choice: int
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    finish_reason: str
    error: str
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., choice: _Optional[int] = ..., index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., error: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "logprob", "top")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    top: TopTokens
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Union[TopTokens, _Mapping]] = ...) -> None: ...

class TopTokens(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: _containers.RepeatedScalarFieldContainer[int]
    logprob: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[_Iterable[int]] = ..., logprob: _Optional[_Iterable[float]] = ...) -> None: ...

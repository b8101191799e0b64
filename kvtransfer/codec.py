"""Dataclasses to protobuf and back. KV bytes are `kv_frame.py`'s."""

from kvtransfer.layout import spec_from_proto, spec_to_proto
from kvtransfer.messages import (
    Cancel,
    Description,
    Open,
    StateSite,
    TokenFrame,
)
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.sampling import SEED_MASK, SamplingParams
from prad.core.tokens import Token, TokenEvent


def open_to_proto(request: Open, hand_off: int = 0) -> pb.Open:
    """hand_off: its number on the stream."""
    return pb.Open(
        hand_off=hand_off,
        request_id=request.request_id,
        attempt=request.attempt,
        client_id=request.client_id,
        model=spec_to_proto(request.model),
        kv_len=request.kv_len,
        prompt_len=request.prompt_len,
        next_position=request.next_position,
        choices=request.choices,
        prompt_index=request.prompt_index,
        output_offset=request.output_offset,
        sampling=sampling_to_proto(request.sampling),
        prompt_ids=request.prompt_ids,
        deadline_unix_ms=request.deadline_unix_ms,
        state=[pb.StateSite(site=s.site, width=s.width) for s in request.state],
        tokens_per_event=request.tokens_per_event,
    )


def open_from_proto(message: pb.Open) -> Open:
    """Raises ValueError if the model spec is none (unknown dtype, no layers)."""
    return Open(
        request_id=message.request_id,
        attempt=message.attempt,
        client_id=message.client_id,
        model=spec_from_proto(message.model),
        kv_len=message.kv_len,
        prompt_len=message.prompt_len,
        next_position=message.next_position,
        choices=message.choices,
        prompt_index=message.prompt_index,
        output_offset=message.output_offset,
        sampling=sampling_from_proto(message.sampling),
        prompt_ids=tuple(message.prompt_ids),
        deadline_unix_ms=message.deadline_unix_ms,
        state=tuple(StateSite(s.site, s.width) for s in message.state),
        tokens_per_event=message.tokens_per_event,
    )


def sampling_to_proto(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed & SEED_MASK,  # keys use the same 64 bits: a negative seed draws the same
        min_tokens=sampling.min_tokens,
        stop_ids=sorted(sampling.stop_ids),
        logprobs=sampling.logprobs,
    )


def sampling_from_proto(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        min_tokens=message.min_tokens,
        stop_ids=frozenset(message.stop_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def token_to_proto(token: Token) -> pb.Token:
    if token.logprob is None:
        return pb.Token(id=token.id)
    return pb.Token(
        id=token.id,
        logprob=token.logprob,
        top_ids=[i for i, _ in token.top],
        top_logprobs=[value for _, value in token.top],
    )


def token_from_proto(message: pb.Token) -> Token:
    logprob = message.logprob if message.HasField("logprob") else None
    return Token(message.id, logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=False)))


def frame_to_proto(frame: TokenFrame) -> pb.TokenReply:
    events = [
        pb.TokenEvent(
            request_id=e.request_id,
            attempt=e.attempt,
            choice=e.choice,
            index=e.index,
            tokens=[token_to_proto(token) for token in e.tokens],
            finish_reason=e.finish_reason or "",
            error=e.error or "",
        )
        for e in frame.events
    ]
    return pb.TokenReply(frame=pb.TokenFrame(frame=frame.number, events=events))


def frame_from_proto(message: pb.TokenFrame) -> TokenFrame:
    events = tuple(
        TokenEvent(
            request_id=e.request_id,
            attempt=e.attempt,
            choice=e.choice,
            index=e.index,
            tokens=tuple(token_from_proto(token) for token in e.tokens),
            finish_reason=e.finish_reason or None,
            error=e.error or None,
        )
        for e in message.events
    )
    return TokenFrame(message.frame, events)


def cancel_to_proto(cancel: Cancel) -> pb.TokenControl:
    message = pb.Cancel(request_id=cancel.request_id, attempt=cancel.attempt, choice=cancel.choice)
    return pb.TokenControl(cancel=message)


def cancel_from_proto(message: pb.Cancel) -> Cancel:
    choice = message.choice if message.HasField("choice") else None
    return Cancel(message.request_id, message.attempt, choice)


def description_to_proto(description: Description) -> pb.Description:
    return pb.Description(
        model=spec_to_proto(description.model),
        block_size=description.block_size,
        total_blocks=description.total_blocks,
        free_blocks=description.free_blocks,
        max_sequences=description.max_sequences,
        running_sequences=description.running_sequences,
        instance=description.instance,
    )


def description_from_proto(message: pb.Description) -> Description:
    return Description(
        model=spec_from_proto(message.model),
        block_size=message.block_size,
        total_blocks=message.total_blocks,
        free_blocks=message.free_blocks,
        max_sequences=message.max_sequences,
        running_sequences=message.running_sequences,
        instance=message.instance,
    )

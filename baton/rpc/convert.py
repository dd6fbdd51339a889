"""Protocol buffers ↔ baton.types, errors ↔ gRPC statuses. Protos stop here: no other module looks into one, but to fill or read a call."""

import dataclasses
from typing import Any, cast

import grpc
import grpc.aio

from baton.errors import BatonError, InternalError, Overloaded, RequestCancelled, Unavailable, WorkerLost, error_classes
from baton.hashing import HASH_BYTES
from baton.rpc.v1 import common_pb2 as common
from baton.rpc.v1 import decode_pb2 as decode
from baton.rpc.v1 import prefill_pb2 as prefill
from baton.rpc.v1 import worker_pb2 as worker
from baton.types import (
    BlocksRemoved,
    BlocksStored,
    CacheReport,
    Digest,
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    KVEvent,
    Load,
    Member,
    MemberState,
    OutputToken,
    Pace,
    PushShard,
    PushTarget,
    Role,
    SamplingParams,
    StateUpdate,
    Tier,
    TokenLogprobs,
)

_CODE_KEY, _PARAM_KEY = "baton-error-code", "baton-error-param"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRPC's own: clients with a retry policy wait so long
_FINISH = {
    FinishReason.STOP: common.FINISH_REASON_STOP,
    FinishReason.LENGTH: common.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common.FINISH_REASON_ABORT,
}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}
_ROLES: dict[Role, Any] = {role: worker.Role.Value(f"ROLE_{role.name}") for role in Role}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}
_STATES: dict[MemberState, Any] = {state: worker.MemberState.Value(f"MEMBER_STATE_{state.name}") for state in MemberState}
_STATES_BACK = {number: state for state, number in _STATES.items()}
_TIERS: dict[Tier, Any] = {tier: worker.Tier.Value(f"TIER_{tier.name}") for tier in Tier}
_TIERS_BACK = {number: tier for tier, number in _TIERS.items()}


# -- requests


def _plain(value: object, cls: Any) -> dict[str, Any]:
    """The fields of dataclass `cls`, from one of it or from its proto, where they have the same names."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(cls)}


def sampling_to_proto(params: SamplingParams) -> common.SamplingParams:
    fields = _plain(params, SamplingParams)
    fields["logit_bias"] = dict(params.logit_bias)
    return common.SamplingParams(**fields)


def sampling_from_proto(message: common.SamplingParams) -> SamplingParams:
    fields = _plain(message, SamplingParams)
    fields["logit_bias"], fields["stop_token_ids"] = dict(message.logit_bias), tuple(message.stop_token_ids)
    fields |= {name: None for name in ("logprobs", "prompt_logprobs") if not cast(Any, message).HasField(name)}
    return SamplingParams(**fields)


def request_to_proto(request: GenerateRequest) -> common.SequenceRequest:
    return common.SequenceRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_proto(request.sampling),
        output_token_ids=request.output_token_ids,
        salt=request.salt,
        traceparent=request.traceparent,
    )


def request_from_proto(message: common.SequenceRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids[:]),  # a copy in one piece: protobuf's iterator takes half as long again
        sampling=sampling_from_proto(message.sampling),
        output_token_ids=tuple(message.output_token_ids),
        salt=message.salt,
        traceparent=message.traceparent,
    )


# -- outputs


def _logprobs_to_proto(logprobs: TokenLogprobs) -> common.TokenLogprobs:
    top = [common.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top]
    return common.TokenLogprobs(logprob=logprobs.logprob, rank=logprobs.rank, top=top)


def _logprobs_from_proto(message: common.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, message.rank, tuple((item.token_id, item.logprob) for item in message.top))


def token_to_proto(token: OutputToken) -> common.OutputToken:
    if token.logprobs is None:
        return common.OutputToken(token_id=token.token_id)
    return common.OutputToken(token_id=token.token_id, logprobs=_logprobs_to_proto(token.logprobs))


def token_from_proto(message: common.OutputToken) -> OutputToken:
    return OutputToken(message.token_id, _logprobs_from_proto(message.logprobs) if message.HasField("logprobs") else None)


def finish_to_proto(reason: FinishReason | None) -> common.FinishReason:
    return common.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH[reason]


def output_to_proto(output: GenerateOutput) -> common.SequenceOutput:
    message = common.SequenceOutput(
        tokens=[token_to_proto(token) for token in output.tokens],
        num_computed_tokens=output.num_computed_tokens,
        num_saved_blocks=output.num_saved_blocks,
        num_pushed_blocks=output.num_pushed_blocks,
        pushed_sums=output.pushed_sums,
    )
    if output.finish_reason is not None:
        message.finish_reason = _FINISH[output.finish_reason]
    if output.stop_token_id is not None:
        message.stop_token_id = output.stop_token_id
    for item in output.prompt_logprobs:
        message.prompt_logprobs.add(logprobs=None if item is None else _logprobs_to_proto(item))
    if output.cache is not None:
        message.cache.CopyFrom(common.CacheReport(**_plain(output.cache, CacheReport)))
    return message


def output_from_proto(message: common.SequenceOutput) -> GenerateOutput:
    return GenerateOutput(
        tokens=tuple([token_from_proto(token) for token in message.tokens]),
        finish_reason=_FINISH_BACK.get(message.finish_reason),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        prompt_logprobs=tuple(
            [_logprobs_from_proto(item.logprobs) if item.HasField("logprobs") else None for item in message.prompt_logprobs]
        ),
        num_computed_tokens=message.num_computed_tokens,
        num_saved_blocks=message.num_saved_blocks,
        num_pushed_blocks=message.num_pushed_blocks,
        pushed_sums=tuple(message.pushed_sums),
        cache=CacheReport(**_plain(message.cache, CacheReport)) if message.HasField("cache") else None,
    )


# -- push targets


def target_to_proto(target: PushTarget) -> prefill.PushTarget:
    return prefill.PushTarget(
        lease=target.lease,
        first_block=target.first_block,
        shards=[
            prefill.PushShard(
                machine=shard.machine,
                sessions=[prefill.PushSession(protocol=protocol, session=session) for protocol, session in shard.sessions],
                addresses=shard.addresses,
            )
            for shard in target.shards
        ],
    )


def target_from_proto(message: prefill.PushTarget) -> PushTarget:
    return PushTarget(
        lease=message.lease,
        first_block=message.first_block,
        shards=tuple(
            PushShard(
                shard.machine,
                tuple((session.protocol, session.session) for session in shard.sessions),
                tuple(shard.addresses),
            )
            for shard in message.shards
        ),
    )


# -- members and their state


def member_to_proto(member: Member) -> worker.Member:
    return worker.Member(**{**_plain(member, Member), "role": _ROLES[member.role], "state": _STATES[member.state]})


def member_from_proto(message: worker.Member) -> Member:
    fields = _plain(message, Member)
    fields["role"], fields["state"] = _ROLES_BACK[message.role], _STATES_BACK[message.state]
    return Member(**fields)


def load_to_proto(load: Load) -> worker.Load:
    fields = _plain(load, Load)
    fields["pace"] = worker.Pace(**_plain(load.pace, Pace))
    fields["fetch_token_s"] = [worker.FetchRate(tier=_TIERS[tier], token_s=seconds) for tier, seconds in load.fetch_token_s]
    return worker.Load(**fields)


def load_from_proto(message: worker.Load) -> Load:
    fields = _plain(message, Load)
    fields["pace"] = Pace(**_plain(message.pace, Pace))
    fields["fetch_token_s"] = tuple((_TIERS_BACK[each.tier], each.token_s) for each in message.fetch_token_s)
    return Load(**fields)


def _event_to_proto(event: KVEvent) -> worker.KVEvent:
    removed = isinstance(event, BlocksRemoved)
    return worker.KVEvent(removed=removed, tier=_TIERS[event.tier], block_hashes=b"".join(event.block_hashes))


def _event_from_proto(message: worker.KVEvent) -> KVEvent:
    data = message.block_hashes
    hashes = tuple(data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES))
    return (BlocksRemoved if message.removed else BlocksStored)(hashes, _TIERS_BACK[message.tier])


def _digest_to_proto(digest: Digest) -> worker.Digest:
    return worker.Digest(tier=_TIERS[digest.tier], num_blocks=digest.num_blocks, xor=digest.xor.to_bytes(HASH_BYTES))


def state_to_proto(update: StateUpdate) -> worker.StateUpdate:
    return worker.StateUpdate(
        sequence=update.sequence,
        state=_STATES[update.state],
        load=load_to_proto(update.load),
        events=[_event_to_proto(event) for event in update.events],
        snapshot=update.snapshot,
        digests=[_digest_to_proto(digest) for digest in update.digests],
        arrived=update.arrived,
    )


def state_from_proto(message: worker.StateUpdate) -> StateUpdate:
    return StateUpdate(
        sequence=message.sequence,
        state=_STATES_BACK[message.state],
        load=load_from_proto(message.load),
        events=tuple(_event_from_proto(event) for event in message.events),
        snapshot=message.snapshot,
        digests=tuple(Digest(_TIERS_BACK[each.tier], each.num_blocks, int.from_bytes(each.xor)) for each in message.digests),
        arrived=tuple(message.arrived),
    )


# -- errors


def failure_to_proto(error: BatonError) -> decode.Failure:
    return decode.Failure(code=error.code, message=error.message, param=error.param or "")


def failure_from_proto(failure: decode.Failure) -> BatonError:
    return error_classes().get(failure.code, InternalError)(failure.message, param=failure.param or None)


def error_status(error: BatonError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Status, message and trailing metadata, as `ServicerContext.abort` takes them."""
    metadata = [(_CODE_KEY, error.code)]
    if error.param:
        metadata.append((_PARAM_KEY, error.param))
    if isinstance(error, Unavailable) and error.retry_after_s is not None:
        metadata.append((_PUSHBACK_KEY, str(max(int(error.retry_after_s * 1000), 1))))
    return getattr(grpc.StatusCode, error.grpc_status), error.message, tuple(metadata)


def error_from_rpc(error: grpc.aio.AioRpcError, who: str) -> BatonError:
    """What a failed call to `who` means. A status without our code comes from gRPC itself: then the peer is lost. (It says
    INTERNAL, "Internal error from Core", of one that was killed while something was on its way there.)"""
    pairs = cast("list[tuple[str, str | bytes]]", error.trailing_metadata() or [])
    metadata = {key: str(value) for key, value in pairs}
    message = error.details() or error.code().name
    cls = error_classes().get(metadata.get(_CODE_KEY, ""))
    if cls is not None:
        return cls(message, param=metadata.get(_PARAM_KEY))
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL):
        return WorkerLost(f"{who} is gone: {message}")
    if error.code() is grpc.StatusCode.CANCELLED:
        return RequestCancelled(f"the call to {who} was cancelled")
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"{who}: {message}")
    return InternalError(f"{who} failed: {error.code().name}: {message}")

from baton.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillCandidate(_message.Message):
    __slots__ = ("id", "address", "instance", "machine", "tensor_parallel_size")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    instance: str
    machine: str
    tensor_parallel_size: int
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., instance: _Optional[str] = ..., machine: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("sequence", "prefill_candidates")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceRequest
    prefill_candidates: _containers.RepeatedCompositeFieldContainer[PrefillCandidate]
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceRequest, _Mapping]] = ..., prefill_candidates: _Optional[_Iterable[_Union[PrefillCandidate, _Mapping]]] = ...) -> None: ...

class PrefillDecision(_message.Message):
    __slots__ = ("prefill_id", "reason", "failed")
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    prefill_id: str
    reason: str
    failed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prefill_id: _Optional[str] = ..., reason: _Optional[str] = ..., failed: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("output", "prefill")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    output: _common_pb2.SequenceOutput
    prefill: PrefillDecision
    def __init__(self, output: _Optional[_Union[_common_pb2.SequenceOutput, _Mapping]] = ..., prefill: _Optional[_Union[PrefillDecision, _Mapping]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("call", "start")
    CALL_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    call: int
    start: GenerateRequest
    def __init__(self, call: _Optional[int] = ..., start: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("call", "response", "failure")
    CALL_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    call: int
    response: GenerateResponse
    failure: Failure
    def __init__(self, call: _Optional[int] = ..., response: _Optional[_Union[GenerateResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class SessionEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[SessionEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[SessionEvent, _Mapping]]] = ...) -> None: ...

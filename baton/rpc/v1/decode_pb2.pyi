from baton.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillCandidate(_message.Message):
    __slots__ = ("id", "address")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("sequence", "prefill_candidates")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceRequest
    prefill_candidates: _containers.RepeatedCompositeFieldContainer[PrefillCandidate]
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceRequest, _Mapping]] = ..., prefill_candidates: _Optional[_Iterable[_Union[PrefillCandidate, _Mapping]]] = ...) -> None: ...

class PrefillDecision(_message.Message):
    __slots__ = ("prefill_id", "reason")
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    prefill_id: str
    reason: str
    def __init__(self, prefill_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("output", "prefill")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    output: _common_pb2.SequenceOutput
    prefill: PrefillDecision
    def __init__(self, output: _Optional[_Union[_common_pb2.SequenceOutput, _Mapping]] = ..., prefill: _Optional[_Union[PrefillDecision, _Mapping]] = ...) -> None: ...

from baton.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PushSession(_message.Message):
    __slots__ = ("protocol", "session")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    session: str
    def __init__(self, protocol: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class PushShard(_message.Message):
    __slots__ = ("machine", "sessions", "addresses")
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    machine: str
    sessions: _containers.RepeatedCompositeFieldContainer[PushSession]
    addresses: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, machine: _Optional[str] = ..., sessions: _Optional[_Iterable[_Union[PushSession, _Mapping]]] = ..., addresses: _Optional[_Iterable[int]] = ...) -> None: ...

class PushTarget(_message.Message):
    __slots__ = ("lease", "first_block", "shards")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    lease: str
    first_block: int
    shards: _containers.RepeatedCompositeFieldContainer[PushShard]
    def __init__(self, lease: _Optional[str] = ..., first_block: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[PushShard, _Mapping]]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "fingerprint", "target")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceRequest
    fingerprint: str
    target: PushTarget
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceRequest, _Mapping]] = ..., fingerprint: _Optional[str] = ..., target: _Optional[_Union[PushTarget, _Mapping]] = ...) -> None: ...

class EndLeaseRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: str
    def __init__(self, lease: _Optional[str] = ...) -> None: ...

class EndLeaseResponse(_message.Message):
    __slots__ = ("clean", "known", "instance")
    CLEAN_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    clean: bool
    known: bool
    instance: str
    def __init__(self, clean: _Optional[bool] = ..., known: _Optional[bool] = ..., instance: _Optional[str] = ...) -> None: ...

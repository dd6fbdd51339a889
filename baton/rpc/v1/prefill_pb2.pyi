from baton.rpc.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "fingerprint")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceRequest
    fingerprint: str
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceRequest, _Mapping]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

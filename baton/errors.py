"""Every error Baton raises, in one tree.

    BatonError
    ├── InvalidRequest            the caller sent something wrong, and can mend it
    │   ├── PromptTooLong
    │   ├── ModelNotFound
    │   ├── TooLarge              the body has too many bytes
    │   └── Unauthorized          no API key, or one that nobody has
    ├── RequestCancelled          the caller went away
    ├── Unavailable               right request, wrong moment: try again, or elsewhere
    │   ├── NoWorkers             no worker (pair) can take the request
    │   ├── WorkerLost            a worker died with the request in its hands
    │   ├── Draining              this worker takes no new work
    │   └── Overloaded            no room: queue or memory is full, or it could not be done in the time asked for
    │       └── RateLimited       the tenant has had what it may have
    ├── ConfigError               the process can't start with this configuration
    ├── ModelError                the model folder can't be served
    │   ├── UnsupportedModel
    │   └── BrokenCheckpoint
    ├── StoreError                the KV pool failed; callers turn it into a miss
    ├── TransferError             memory can't be pushed into, or a peer's can't be reached; callers go another way
    ├── MembershipError           etcd (or the static list) can't be reached or understood
    └── InternalError             a bug in Baton

Each class carries how it looks on the wire: `code` (stable, for programs), `http_status` and `grpc_status` (a name of
`grpc.StatusCode`). A message says what is wrong and what the reader can do about it.
"""

from typing import ClassVar


class BatonError(Exception):
    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """Name of the request field at fault, where there is one."""
        self.counted = False
        """In a metric of this process."""


class InvalidRequest(BatonError):
    code, http_status, grpc_status = "invalid_request_error", 400, "INVALID_ARGUMENT"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    code, http_status, grpc_status = "model_not_found", 404, "NOT_FOUND"


class TooLarge(InvalidRequest):
    code, http_status = "request_too_large", 413


class Unauthorized(InvalidRequest):
    code, http_status, grpc_status = "invalid_api_key", 401, "UNAUTHENTICATED"


class RequestCancelled(BatonError):
    code, http_status, grpc_status = "request_cancelled", 499, "CANCELLED"


class Unavailable(BatonError):
    code, http_status, grpc_status = "unavailable", 503, "UNAVAILABLE"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s
        """When it is worth another try, where that is known."""


class NoWorkers(Unavailable):
    code = "no_workers"


class WorkerLost(Unavailable):
    code = "worker_lost"


class Draining(Unavailable):
    code = "draining"


class Overloaded(Unavailable):
    code, http_status, grpc_status = "overloaded", 429, "RESOURCE_EXHAUSTED"


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class ConfigError(BatonError):
    code = "config_error"


class ModelError(BatonError):
    code = "model_error"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class BrokenCheckpoint(ModelError):
    code = "broken_checkpoint"


class StoreError(BatonError):
    code = "store_error"


class TransferError(BatonError):
    code = "transfer_error"


class MembershipError(BatonError):
    code, http_status, grpc_status = "membership_error", 503, "UNAVAILABLE"


class InternalError(BatonError):
    pass


EXIT_CONFIG = 2  # what was given can't be served, and starting again would change nothing
EXIT_SOFTWARE = 70  # starting again may help, which is a supervisor's business


def exit_code(error: BatonError) -> int:
    """Of a process that `error` has ended."""
    return EXIT_CONFIG if isinstance(error, ConfigError | ModelError) else EXIT_SOFTWARE


def error_classes() -> dict[str, type[BatonError]]:
    """Every class of the tree by its `code`; how a wire code becomes an exception again."""
    found: dict[str, type[BatonError]] = {}
    pending: list[type[BatonError]] = [BatonError]
    while pending:
        cls = pending.pop(0)
        found.setdefault(cls.code, cls)
        pending.extend(cls.__subclasses__())
    found["internal_error"] = InternalError
    return found

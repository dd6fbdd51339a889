"""Configuration: frozen, strict, read once. The only module that reads the environment for settings.

Sources, later ones win: defaults below, a YAML file, `BATON_…` environment variables (`BATON_ENGINE__BLOCK_SIZE=32`), and `key.path=value`
overrides of the command line. An unknown key is an error that names the nearest known one. Builders hand plain values on: nothing below
`services` and `runtime.build` takes a configuration.
"""

import difflib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from baton.errors import ConfigError
from baton.types import Role

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+")


def _parse_size(value: object) -> object:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([\d.]+)\s*([kmgt]i?)?b?\s*", value.lower())):
        return int(float(match[1]) * _UNITS[match[2] or ""])
    return value


_SIZE_SCHEMA: dict[str, Any] = {"type": ["integer", "string"], "minimum": 0, "pattern": r"^\s*[\d.]+\s*([kKmMgGtT][iI]?)?[bB]?\s*$"}
Size = Annotated[int, BeforeValidator(_parse_size), Field(ge=0), WithJsonSchema(_SIZE_SCHEMA)]
"""Bytes: an integer, or text such as 512MiB."""


def _as_names(value: object) -> object:
    return ((value,) if value else ()) if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_names)]
"""One text, or a list."""

PolicyName = Literal["predicted", "prefix_aware", "least_load", "round_robin", "random", "cache_aware", "dynamo", "llm_d", "mooncake"]
"""Of the router; services/router/policies.py has them."""
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


def check_policy(name: str) -> PolicyName:
    """Raises ConfigError for a name that there is not."""
    for known in POLICY_NAMES:
        if name == known:
            return known
    near = difflib.get_close_matches(name, POLICY_NAMES, n=1)
    raise ConfigError(f"there is no policy {name!r}{f'; did you mean {near[0]}?' if near else ''}; there are {', '.join(POLICY_NAMES)}")


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ServerConfig(Strict):
    id: str = ""  # empty: role and a random suffix
    host: str = "127.0.0.1"  # what the servers bind; nothing listens on all interfaces unless told
    advertise: str = ""  # host that others reach this process at; empty: `host`
    grpc_port: int = Field(default=0, ge=0, le=65535)  # 0: any free one
    metrics_port: int = Field(default=0, ge=0, le=65535)  # Prometheus; 0: any free one
    log_format: Literal["text", "json"] = "text"  # of standard error; json: an object a line


class SecurityConfig(Strict):
    """mTLS between services (docs/security.md), the same in all of a cluster. Nothing set: none, and they listen on the loopback alone."""

    cert: str = ""  # PEM file, chain included: what this process shows, called or calling
    key: str = ""  # PEM file, not encrypted
    authority: str = ""  # PEM file: of who signs the certificates of these services, and nobody else's
    name: str = Field(default="baton.internal", min_length=1)  # among the names in each of them; addresses need not be
    insecure: bool = False  # listen elsewhere too without certificates: whoever reaches a port may then ask for anything

    @model_validator(mode="after")
    def _whole(self) -> "SecurityConfig":
        given = [bool(self.cert), bool(self.key), bool(self.authority)]
        if any(given) and not all(given):
            raise ValueError("mTLS needs three files: give security.cert, security.key and security.authority")
        if all(given) and self.insecure:
            raise ValueError(
                "security.insecure=true is for services without certificates: take it away, or security.cert, key and authority"
            )
        return self


class EtcdAccessConfig(Strict):
    """What etcd is shown, where it asks."""

    authority: str = ""  # PEM file: of who signed etcd's certificate; with https:// in cluster.etcd
    name: str = ""  # in that certificate; empty: the host in cluster.etcd
    cert: str = ""  # PEM file, chain included: this process's own; empty: none
    key: str = ""  # PEM file
    user: str = ""  # empty: none
    password_file: str = ""  # the password is its first line

    @model_validator(mode="after")
    def _whole(self) -> "EtcdAccessConfig":
        for one, other in (("cert", "key"), ("user", "password_file")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise ValueError(f"one is nothing without the other: give cluster.etcd_access.{one} and {other}")
        return self


class ClusterConfig(Strict):
    name: str = "baton"  # clusters of different names share an etcd without seeing each other
    etcd: str = ""  # http://host:port[,host:port], or https://…; empty: static membership
    etcd_access: EtcdAccessConfig = EtcdAccessConfig()
    workers: tuple[str, ...] = ()  # static membership: gRPC addresses, host:port
    lease_s: float = Field(default=5.0, gt=0)  # how long a silent member is believed alive; no wait in the system is longer

    @model_validator(mode="after")
    def _whole(self) -> "ClusterConfig":
        encrypted, access = self.etcd.startswith("https://"), self.etcd_access
        if encrypted and not access.authority:
            raise ValueError("an etcd at https:// shows a certificate: give cluster.etcd_access.authority, the file of who signed it")
        if not encrypted and (access.authority or access.cert or access.name):
            raise ValueError("cluster.etcd_access has files of certificates, and cluster.etcd is not at https://")
        return self


class EngineConfig(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: what the model's config.json says
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # dummy: random weights, of which config.json alone is needed
    block_size: int | None = Field(default=None, ge=1)  # tokens per KV block; None: CPU 16, CUDA 64
    kv_memory: Size | None = None  # bytes of KV cache, of all ranks; None: 256 MiB on CPU, on CUDA what gpu_memory_utilization leaves
    num_blocks: int | None = Field(default=None, ge=2)  # instead of kv_memory
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)  # share of the GPU's memory for weights, activations and KV cache
    max_model_len: int | None = Field(default=None, ge=1)  # tokens; None: what the model's config.json says
    max_num_batched_tokens: int | None = Field(default=None, ge=1)  # of a step; longer prompts go in chunks; None: CPU 512, CUDA 8192
    max_num_seqs: int | None = Field(default=None, ge=1)  # None: CPU 64, CUDA 256
    prefix_caching: bool = True
    num_threads: int | None = Field(default=None, ge=1)  # of torch on CPU, for each rank
    tensor_parallel_size: int = Field(default=1, ge=1)  # ranks that share the model: a process and, on CUDA, a GPU each
    step_timeout_s: float = Field(default=300.0, ge=5)  # a step that takes longer is stuck: the process ends, its requests move


class ParallelConfig(Strict):
    """Where a worker's other ranks run (docs/parallel.md)."""

    launcher: Literal["local", "ray"] = "local"  # processes of this machine, or of the nodes of the Ray cluster that this machine is one of
    ray_address: str = "auto"  # host:port of Ray's head; auto: what RAY_ADDRESS says, or whom this machine has joined
    wait_s: float = Field(default=60.0, gt=0)  # for Ray to have room for all ranks


class PoolConfig(Strict):
    master: str = ""  # host:port of mooncake_master; etcd: whichever leads, by cluster.etcd; empty: no pool
    protocol: Literal["tcp", "rdma"] = "tcp"
    devices: str = ""  # RDMA devices, comma-separated
    host: str = "127.0.0.1"  # that other store clients reach this one at
    budget_s: float = Field(default=2.0, gt=0)  # a slower read from a tier counts as a miss; half of it for a lookup
    local_buffer: Size = 16 * 2**20
    near: str = "auto"  # directory where nodes hand their memory to workers of this machine; auto: one of this user; empty: never
    verify: bool = False  # blocks' checksums are taken when they were computed, for tests: slow, and not on a GPU


class HostConfig(Strict):
    """The worker's KV tier in this machine's memory."""

    bytes: Size = 0  # 0: none


class FilesConfig(Strict):
    """The worker's KV tier in a directory, on an SSD or a shared file system."""

    path: str = ""  # empty: none
    bytes: Size = 0  # budget of the directory
    shared: bool = False  # every worker has this directory: what one has saved there, others are told to read

    @model_validator(mode="after")
    def _whole(self) -> "FilesConfig":
        if self.path and not self.bytes:
            raise ValueError("files.path needs a budget: give files.bytes, for example files.bytes=100GiB")
        if not self.path and (self.bytes or self.shared):
            raise ValueError("files.bytes and files.shared say nothing without files.path: give a directory")
        return self


class PushConfig(Strict):
    """How prefill workers write KV straight into decode workers' memory. No protocols: never, KV goes by the pool alone."""

    protocols: tuple[Literal["nvlink_intra", "rdma", "tcp"], ...] | None = None  # None: all that this machine has
    host: str = ""  # that peers reach this process's Transfer Engine at; empty: server.advertise, or server.host
    devices: str = ""  # RDMA devices, comma-separated
    limit_s: float = Field(default=5.0, gt=0)  # a push that takes longer has failed
    verify: bool = False  # checksums travel with the news of what was pushed, for tests: slow, and not on a GPU


class TracingConfig(Strict):
    """OpenTelemetry spans of requests (docs/tracing.md); needs the extra `otel`."""

    endpoint: str = Field(default="", pattern=r"^(https?://.+)?$")  # OTLP over HTTP, http://host:4318/v1/traces; empty: off
    sample: float = Field(default=1.0, ge=0, le=1)  # share of the requests that come without a trace of their own
    interval_s: float = Field(default=2.0, gt=0)  # between two batches
    timeout_s: float = Field(default=5.0, gt=0)  # of one


class WorkerConfig(Strict):
    """A prefill, decode or unified worker."""

    role: Role = Role.UNIFIED
    model: str = ""  # Hugging Face folder
    served_model_name: Names = ()  # the router's: the first is the label of metrics; empty: the folder's name
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    security: SecurityConfig = SecurityConfig()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    host: HostConfig = HostConfig()
    pool: PoolConfig = PoolConfig()
    files: FilesConfig = FilesConfig()
    push: PushConfig = PushConfig()
    tracing: TracingConfig = TracingConfig()
    max_local_prefill_tokens: int = Field(default=64, ge=0)  # a decode worker computes a missing prompt remainder up to this itself
    drain_grace_s: float = Field(default=30.0, ge=0)


class TenantConfig(Strict):
    """Who may ask, and for how much."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    key_file: str = ""  # its API keys, one a line; empty: all who are nobody else (one tenant at most)
    weight: float = Field(default=1.0, gt=0)  # of its share, where others of its priority wait too
    priority: int = 0  # of its requests that ask for none; lower is served earlier
    most_urgent: int | None = None  # that they may ask for; None: `priority`
    requests_per_s: float | None = Field(default=None, gt=0)
    tokens_per_min: float | None = Field(default=None, gt=0)  # prompt and output


class AdmissionConfig(Strict):
    """When the router keeps requests waiting, and when it refuses them. Nothing set: it does neither."""

    max_running: int | None = Field(default=None, ge=1)  # sequences that this router has at the workers
    backlog_s: float | None = Field(default=None, gt=0)  # requests wait here while they would wait for longer than this at the workers
    max_waiting: int = Field(default=1024, ge=0)  # requests; 0: what cannot go at once is refused
    max_wait_s: float = Field(default=30.0, gt=0)
    ttft_slo_s: float | None = Field(default=None, gt=0)  # of requests that bring none of their own
    itl_slo_s: float | None = Field(default=None, gt=0)


class HedgingConfig(Strict):
    """When the router sends a sequence to a second worker too (docs/admission.md). Nothing set: never."""

    after: float | None = Field(default=None, gt=1)  # once its first token takes so many times as long as predicted; None: never
    at_least_s: float = Field(default=0.5, gt=0)  # but not before; where no time is predicted, then
    share: float = Field(default=0.05, gt=0, le=1)  # of the sequences, at most, and ten at once

    @model_validator(mode="after")
    def _whole(self) -> "HedgingConfig":
        if self.after is None and (given := sorted(self.model_fields_set - {"after"})):
            raise ValueError(f"hedging.{given[0]} says nothing without hedging.after: give it, for example hedging.after=3")
        return self


class TLSConfig(Strict):
    """Of the router's ports for clients."""

    cert: str = ""  # PEM file, chain included; empty: plain HTTP, and gRPC as `security` has it
    key: str = ""  # PEM file

    @model_validator(mode="after")
    def _whole(self) -> "TLSConfig":
        if bool(self.cert) != bool(self.key):
            raise ValueError("tls needs both files: give tls.cert and tls.key")
        return self


class RouterConfig(Strict):
    model: str = ""  # Hugging Face folder: tokenizer, chat template, generation defaults
    served_model_name: Names = ()  # what clients may call it, the shown name first; empty: the folder's name
    server: ServerConfig = ServerConfig()
    http_port: int = Field(default=8000, ge=0, le=65535)
    cluster: ClusterConfig = ClusterConfig()
    security: SecurityConfig = SecurityConfig()
    policy: PolicyName = "predicted"
    local_prefill: bool = True  # predicted: a decode worker may be told to compute a whole prompt where that costs everybody less
    max_body: Size = 16 * 2**20
    allowed_origins: tuple[str, ...] = ()  # of pages whose scripts may call it (CORS): ["https://chat.example"]; ["*"]: of all
    max_migrations: int = Field(default=3, ge=0)  # per sequence
    drain_grace_s: float = Field(default=30.0, ge=0)
    tenants: tuple[TenantConfig, ...] = ()  # none: everybody may ask for everything
    admission: AdmissionConfig = AdmissionConfig()
    hedging: HedgingConfig = HedgingConfig()
    tls: TLSConfig = TLSConfig()
    tracing: TracingConfig = TracingConfig()
    explained: int = Field(default=256, ge=0)  # requests, the latest, that /debug/routes can tell about

    @model_validator(mode="after")
    def _origins(self) -> "RouterConfig":
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origins: browsers send no origin {origin!r}: give scheme://host[:port] alone, or *")
        return self

    @model_validator(mode="after")
    def _told_times(self) -> "RouterConfig":
        promised = [name for name in ("backlog_s", "ttft_slo_s", "itl_slo_s") if getattr(self.admission, name) is not None]
        if promised and self.policy != "predicted":
            raise ValueError(f"admission.{promised[0]} needs predicted times, which policy={self.policy} does not give: take predicted")
        return self


class DiskConfig(Strict):
    """A node's part of the pool on its disk: what is saved to its memory is written there too, and stays when memory forgets it."""

    path: str = ""  # a directory of this node alone, on an SSD; empty: none
    bytes: Size = 0  # its budget
    buffer: Size = 512 * 2**20  # memory, beside what is lent, through which blocks are read from it

    @model_validator(mode="after")
    def _whole(self) -> "DiskConfig":
        if bool(self.path) != bool(self.bytes):
            raise ValueError("disk.path and disk.bytes go together: give a directory and its budget, for example disk.bytes=100GiB")
        if self.path and not os.path.isabs(self.path):
            raise ValueError(f"disk.path={self.path} must begin with /")
        return self


class KVStoreConfig(Strict):
    """A kvstore process: `master` runs and supervises mooncake_master, `node` lends memory to the pool."""

    mode: Literal["master", "node"] = "node"
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    security: SecurityConfig = SecurityConfig()
    pool: PoolConfig = PoolConfig()
    memory: Size = 512 * 2**20  # node: bytes lent
    disk: DiskConfig = DiskConfig()  # node
    ha: bool = False  # master: one of several, of which one leads; needs cluster.etcd
    oplog: bool = True  # master, with ha: the next leader knows the keys; nothing ever removes what is written to etcd for that
    masters: tuple[str, ...] = ()  # node, with pool.master=etcd: host:master_metrics_port of all of them
    master_port: int = Field(default=50051, ge=1, le=65535)  # master: where mooncake_master listens
    master_metrics_port: int = Field(default=9003, ge=1, le=65535)
    hot_reads: int = Field(default=2, ge=0)  # master: a block read so often within 10 s gets a second replica on another node; 0: never
    client_ttl_s: int = Field(default=5, ge=1)  # a silent node is unmounted after so long; the same for masters and nodes with a disk
    drain_grace_s: float = Field(default=10.0, ge=0)


def pool_master(pool: PoolConfig, cluster: ClusterConfig) -> str:
    """Where the KV pool is asked for: empty, host:port, or etcd://host:port;host:port. Raises ConfigError."""
    if pool.master != "etcd":
        return pool.master
    if not cluster.etcd:
        raise ConfigError("pool.master=etcd asks etcd for the leading master: set cluster.etcd, or give host:port of a master")
    if cluster.etcd.startswith("https://") or cluster.etcd_access.user:
        raise ConfigError(
            "several masters of the pool agree by etcd, to which Mooncake speaks without TLS and without a password: with an etcd that "
            "asks for either, run one master and give pool.master=host:port"
        )
    return "etcd://" + etcd_endpoints(cluster)


def etcd_endpoints(cluster: ClusterConfig) -> str:
    """host:port;host:port, as Mooncake wants them."""
    return ";".join(part.rpartition("//")[2].rstrip("/") for part in cluster.etcd.split(","))


def served_names(config: WorkerConfig | RouterConfig) -> tuple[str, ...]:
    """What clients may call the model; the first is shown. Unless it is set, it is the name of the folder as given, wherever a link of that
    name leads; of a snapshot in Hugging Face's cache, the repository's."""
    if config.served_model_name:
        return config.served_model_name
    folder = Path(os.path.abspath(config.model))
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return (repository.removeprefix("models--").replace("--", "/"),)
    return (folder.name,)


def member_id(server: ServerConfig, role: Role) -> str:
    """Who a process is in the cluster."""
    return server.id or f"{role}-{secrets.token_hex(4)}"


C = TypeVar("C", bound=Strict)


def load_config(cls: type[C], path: Path | str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> C:
    """Reads, merges and checks. `overrides` are `key.path=value`, value in YAML. Raises ConfigError with every problem in it."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"configuration {path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict | None):
            raise ConfigError(f"configuration {path} must be a mapping of keys to values, not a {type(loaded).__name__}")
        tree = cast("dict[str, Any]", loaded or {})
    for name, text in sorted((os.environ if environ is None else environ).items()):
        keys = name.lower().removeprefix("baton_").split("__")
        if name.startswith("BATON_") and keys[0] in cls.model_fields:
            _put(tree, keys, text)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} must look like key=value, for example engine.block_size=32")
        _put(tree, key.split("."), text)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(cls, tuple(map(str, item["loc"])), item["msg"], item["type"]) for item in error.errors())
        raise ConfigError(f"{path or 'configuration'}: {problems}") from error


def _put(tree: dict[str, Any], keys: Sequence[str], text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    for key in keys[:-1]:
        section = tree.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
        tree = cast("dict[str, Any]", section)
    tree[keys[-1]] = value


def _explain(cls: type[Strict], location: tuple[str, ...], message: str, kind: str) -> str:
    where = ".".join(location)
    if kind == "model_type":
        return f"{where}: must be a section of keys with values"
    if kind != "extra_forbidden":
        return ": ".join(filter(None, (where, message.removeprefix("Value error, "))))
    known = _section(cls, location[:-1]).model_fields
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else f"; known keys are {', '.join(known)}")


def _section(cls: type[Strict], path: Sequence[str]) -> type[Strict]:
    for key in path:
        if key.isdigit():  # a place in a list, whose section was found by the key before
            continue
        annotation = cls.model_fields[key].annotation
        candidates = (annotation, *get_args(annotation))
        cls = next(c for c in candidates if isinstance(c, type) and issubclass(c, Strict))
    return cls

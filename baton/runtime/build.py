"""From a worker's configuration to what its process hosts: a loaded model behind an engine, a member record, metrics."""

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.cluster.machine import these_cores
from baton.config import EngineConfig, WorkerConfig, member_id, pool_master
from baton.errors import ConfigError
from baton.kernels.table import TORCH, choose
from baton.kv.connect import connect_push
from baton.kv.layout import KVLayout, block_key
from baton.kv.pool import DTYPES, KVPool, num_blocks_for
from baton.kv.tiers import connect_tiers
from baton.kv.transfer import TransferStats
from baton.metrics import WorkerMetrics
from baton.models.config import ModelConfig
from baton.models.loader import dummy_model, load_model, weights_fingerprint
from baton.models.registry import read_config
from baton.runtime.engine import Engine
from baton.runtime.loading import Tier
from baton.runtime.profile import measure_kv_memory, warm_up
from baton.runtime.pushing import Receiver, Sender
from baton.runtime.runner import ModelRunner
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.scheduler import Scheduler
from baton.types import Member, PushTarget, Role

logger = logging.getLogger(__name__)
_DEFAULTS = {"cpu": (16, 512, 64), "cuda": (64, 8192, 256)}  # block size; tokens and requests of a step


@dataclass(frozen=True, slots=True)
class BuiltWorker:
    engine: Engine
    member: Member
    metrics: WorkerMetrics
    pool_available: Callable[[], bool]  # whether KV can go from worker to worker by a shared tier now, as far as is known
    can_push: Callable[[PushTarget], bool]  # whether there is a direct path there
    receives: bool  # whether KV can be pushed here


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and the memory for its KV, on one device."""

    config: ModelConfig
    runner: ModelRunner
    pool: KVPool
    fingerprint: str
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    cores: int  # that steps are computed on; 0: a GPU computes them


def build_worker(config: WorkerConfig) -> BuiltWorker:
    """Raises ModelError for a folder that can't be served, ConfigError for settings that don't fit it."""
    if not config.model:
        raise ConfigError("model is not set: give a Hugging Face model folder, model=/path/to/model")
    if config.role is Role.DECODE and not config.engine.prefix_caching:
        raise ConfigError(
            "a decode worker takes a prompt's KV through its prefix cache: leave engine.prefix_caching on, or use role=unified"
        )
    model = Path(config.model)
    if (config.push.verify or config.pool.verify) and _device(config.engine.device) == "cuda":
        raise ConfigError(
            "push.verify and pool.verify read KV where it lies, which they can't on a GPU; leave them off, or set engine.device=cpu"
        )
    loaded = load(model, config.engine)
    pool = config.pool.model_copy(update={"master": pool_master(config.pool, config.cluster)})
    tiers = connect_tiers(config.host, pool, config.files, loaded.pool.tensor, loaded.pool.layout.block_bytes, cluster=config.cluster.name)
    host = config.push.host or config.server.advertise or config.server.host
    sender, receiver = connect_push(
        config.push.model_copy(update={"host": host}), config.role, loaded.pool.region, cuda=loaded.pool.tensor.is_cuda
    )
    engine = build_engine(
        loaded,
        tiers,
        budget_s=config.pool.budget_s,
        prefix_caching=config.engine.prefix_caching,
        sender=sender,
        receiver=receiver,
        verify_pushes=config.push.verify,
    )
    name = config.served_model_name or model.resolve().name
    member = Member(
        id=member_id(config.server, config.role),
        role=config.role,
        address="",
        model=name,
        fingerprint=loaded.fingerprint,
        block_size=loaded.pool.layout.block_size,
        num_blocks=loaded.pool.num_blocks,
        max_model_len=loaded.max_model_len,
        max_num_batched_tokens=loaded.max_num_batched_tokens,
        device=these_cores(loaded.cores) if loaded.cores else "",
        instance=secrets.token_hex(8),
    )
    pool_stats = next((tier.stats for tier in tiers if tier.name == "pool"), TransferStats())
    metrics = WorkerMetrics(
        name, member.id, lambda: engine.load, pool_stats.values, engine.reservations.values if sender is None else sender.values
    )
    metrics.tiers({tier.name: tier.values for tier in tiers})
    engine.on_crash = lambda: os._exit(70)  # peers see broken streams at once, and a supervisor starts the worker again
    engine.on_step = lambda plan, seconds: metrics.step_seconds.observe(seconds)
    return BuiltWorker(
        engine,
        member,
        metrics,
        lambda: any(tier.shared and tier.available for tier in tiers),
        lambda target: sender is not None and bool(sender.path(target).protocol),
        receiver is not None,
    )


def load(model: Path, settings: EngineConfig) -> LoadedModel:
    """Reads the weights and allocates the KV cache."""
    device = torch.device(_device(settings.device))
    wanted = (settings.block_size, settings.max_num_batched_tokens, settings.max_num_seqs)
    block_size, budget, seqs = (given or default for given, default in zip(wanted, _DEFAULTS[device.type], strict=True))
    if device.type == "cuda" and (block_size < 16 or block_size & (block_size - 1)):
        raise ConfigError(f"engine.block_size={block_size}: on CUDA it must be a power of two, 16 at least")
    threads = settings.num_threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    config = read_config(model)
    dtype = config.dtype if settings.dtype == "auto" else settings.dtype
    layout = KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    dummy = settings.load_format == "dummy"
    fingerprint = layout.fingerprint(f"dummy/{config}" if dummy else weights_fingerprint(model))
    kernels = choose(device, DTYPES[dtype], config.head_dim)
    if dummy:
        network = dummy_model(config, dtype=DTYPES[dtype], device=device)
    else:
        network = load_model(model, config, dtype=DTYPES[dtype], device=device)
    longest = min(settings.max_model_len or config.max_model_len, config.max_model_len)
    network.prepare(kernels, longest)
    warm_up(network, layout, device, num_tokens=min(budget, longest))
    num_blocks = settings.num_blocks
    if num_blocks is None:
        memory = settings.kv_memory
        if memory is None:
            memory = measure_kv_memory(network, layout, device, num_tokens=budget, share=settings.gpu_memory_utilization)
        num_blocks = num_blocks_for(layout, memory)
    max_model_len = min(longest, num_blocks * block_size)
    pool = KVPool(layout, num_blocks, device)
    captured = device.type == "cuda" and kernels is not TORCH  # torch's attention asks the host for lengths
    runner = ModelRunner(
        network,
        pool,
        kernels,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        graphs=captured,
    )
    logger.info(
        "%s on %s in %s: %d KV blocks of %d tokens, %d bytes each; at most %d tokens a request; fingerprint %s",
        model.name, device, dtype, num_blocks, block_size, layout.block_bytes, max_model_len, fingerprint,
    )  # fmt: skip
    cores = 0 if device.type == "cuda" else min(threads, len(os.sched_getaffinity(0)))
    return LoadedModel(config, runner, pool, fingerprint, max_model_len, budget, seqs, cores)


def build_engine(
    loaded: LoadedModel,
    tiers: Sequence[Tier],
    *,
    budget_s: float,
    prefix_caching: bool = True,
    sender: Sender | None = None,
    receiver: Receiver | None = None,
    verify_pushes: bool = False,
) -> Engine:
    """An engine that can be started. `tiers` hold KV behind the device, fastest first; `budget_s` bounds each call to one."""
    block_size = loaded.pool.layout.block_size
    cache = KVCache(loaded.pool.num_blocks, block_size, prefix_caching=prefix_caching)
    return Engine(
        Scheduler(cache, max_num_batched_tokens=loaded.max_num_batched_tokens, max_num_seqs=loaded.max_num_seqs),
        loaded.runner,
        tiers,
        key=lambda block_hash: block_key(loaded.fingerprint, block_hash),
        buffer=loaded.pool.buffer,
        limits=Limits(vocab_size=loaded.config.vocab_size, max_model_len=loaded.max_model_len),
        eos_token_ids=loaded.config.eos_token_ids,
        budget_s=budget_s,
        cores=loaded.cores,
        sender=sender,
        receiver=receiver,
        verify_pushes=verify_pushes,
    )


def _device(asked: str) -> str:
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError(
            "engine.device=cuda, but torch finds no CUDA device here; use engine.device=cpu, or install a CUDA build of torch"
        )
    return "cuda" if asked != "cpu" and available else "cpu"

"""From a worker's configuration to what its process hosts: a loaded model behind an engine, a member record, metrics."""

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.cluster.machine import these_cores
from baton.config import WorkerConfig, served_names
from baton.errors import EXIT_SOFTWARE, ConfigError
from baton.kv.holdings import Holdings
from baton.kv.layout import block_key
from baton.kv.shards import Share
from baton.kv.transfer import TransferStats
from baton.metrics import WorkerMetrics
from baton.models.registry import read_config
from baton.runtime.crew import Crew, Solo
from baton.runtime.engine import Engine
from baton.runtime.launch import connect_launcher
from baton.runtime.loaded import LoadedModel, check_degree, check_devices, device_kind, load
from baton.runtime.pushing import Checksums, Receiver, Sender
from baton.runtime.rank_kv import connect_kv
from baton.runtime.spread import TeamChecksums, TeamReceiver, TeamSender, TeamTier
from baton.runtime.tier import Tier
from baton.runtime.validation import Limits
from baton.scheduling.cache import KVCache
from baton.scheduling.scheduler import Scheduler
from baton.types import Member, PushTarget, Role


@dataclass(frozen=True, slots=True)
class BuiltWorker:
    engine: Engine
    member: Member
    metrics: WorkerMetrics
    pool_available: Callable[[], bool]  # whether KV can go from worker to worker by a shared tier now, as far as is known
    can_push: Callable[[PushTarget], bool]  # whether there is a direct path there
    receives: bool  # whether KV can be pushed here
    block_bytes: int  # of a block's KV, on all ranks together


def build_worker(config: WorkerConfig, name: str) -> BuiltWorker:
    """`name`: who it is in the cluster. Raises ModelError for a folder that can't be served, ConfigError for settings that don't fit it,
    or this machine."""
    if not config.model:
        raise ConfigError("model is not set: give a Hugging Face model folder, model=/path/to/model")
    if config.role is Role.DECODE and not config.engine.prefix_caching:
        raise ConfigError(
            "a decode worker takes a prompt's KV through its prefix cache: leave engine.prefix_caching on, or use role=unified"
        )
    model, size = Path(config.model), config.engine.tensor_parallel_size
    check_degree(read_config(model), size)
    launcher = connect_launcher(config) if size > 1 else None
    kind = device_kind(config.engine.device)
    if (config.push.verify or config.pool.verify) and kind == "cuda":
        raise ConfigError(
            "push.verify and pool.verify read KV where it lies, which they can't on a GPU; leave them off, or set engine.device=cpu"
        )
    if config.parallel.launcher == "local":
        check_devices(size, kind)
    apart = launcher is not None and launcher.apart
    team = Crew(config, launcher) if launcher is not None else Solo()
    loaded = load(model, config.engine, team)
    kv = connect_kv(config, loaded.pool, loaded.layout, Share(0, size), loaded.fingerprint, apart=apart)
    team.ready(loaded.fingerprint)
    sender = TeamSender(kv.sender, team, config.push.limit_s) if kv.sender is not None else None
    receiver = TeamReceiver(kv, team) if kv.receiver is not None else None
    tiers = kv.tiers
    engine = build_engine(
        loaded,
        tiers if size == 1 else [TeamTier(number, kv, team) for number in range(len(tiers))],
        key=None if size == 1 else bytes.hex,
        budget_s=config.pool.budget_s,
        prefix_caching=config.engine.prefix_caching,
        sender=sender,
        receiver=receiver,
        checksums=TeamChecksums(kv, team) if config.push.verify else None,
        holdings=[tier.holdings for tier in tiers if tier.holdings is not None],
    )
    model_name = served_names(config)[0]
    member = Member(
        id=name,
        role=config.role,
        address="",
        model=model_name,
        fingerprint=loaded.fingerprint,
        block_size=loaded.pool.layout.block_size,
        num_blocks=loaded.pool.num_blocks,
        max_model_len=loaded.max_model_len,
        max_num_batched_tokens=loaded.max_num_batched_tokens,
        device=these_cores(loaded.cores * size) if loaded.cores else "",
        tensor_parallel_size=size,
        instance=secrets.token_hex(8),
    )
    pool_stats = next((tier.stats for tier in tiers if tier.name == "pool"), TransferStats())
    metrics = WorkerMetrics(
        model_name, name, lambda: engine.load, pool_stats.values, lambda: engine.reservations.values if sender is None else sender.values
    )
    metrics.tiers({tier.name: tier.values for tier in tiers})
    engine.on_crash = lambda: os._exit(EXIT_SOFTWARE)  # peers see broken streams at once, and a supervisor starts the worker again
    engine.on_stopped = team.close
    engine.on_step = lambda plan, seconds: metrics.step_seconds.observe(seconds)
    return BuiltWorker(
        engine,
        member,
        metrics,
        lambda: any(tier.shared and tier.available for tier in tiers),
        lambda target: sender is not None and sender.reaches(target),
        receiver is not None,
        loaded.layout.block_bytes,
    )


def build_engine(
    loaded: LoadedModel,
    tiers: Sequence[Tier],
    *,
    budget_s: float,
    key: Callable[[bytes], str] | None = None,
    prefix_caching: bool = True,
    sender: Sender | None = None,
    receiver: Receiver | None = None,
    checksums: Checksums | None = None,
    holdings: Sequence[Holdings] = (),
) -> Engine:
    """An engine that can be started. `tiers` hold KV behind the device, fastest first, under `key`; `budget_s` bounds each call to one."""
    block_size, prefix = loaded.pool.layout.block_size, block_key(loaded.fingerprint, b"")
    cache = KVCache(loaded.pool.num_blocks, block_size, prefix_caching=prefix_caching)
    return Engine(
        Scheduler(cache, max_num_batched_tokens=loaded.max_num_batched_tokens, max_num_seqs=loaded.max_num_seqs),
        loaded.runner,
        tiers,
        key=key or (lambda block_hash: prefix + block_hash.hex()),
        buffer=loaded.pool.buffer,
        limits=Limits(vocab_size=loaded.config.vocab_size, max_model_len=loaded.max_model_len),
        eos_token_ids=loaded.config.eos_token_ids,
        budget_s=budget_s,
        cores=loaded.cores,
        sender=sender,
        receiver=receiver,
        checksums=checksums,
        holdings=holdings,
    )

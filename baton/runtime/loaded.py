"""A model and the memory for its KV, on one device: what a worker's process loads, or each of its ranks of its share."""

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.config import EngineConfig
from baton.errors import ConfigError
from baton.kernels.table import TORCH, choose
from baton.kv.layout import KVLayout
from baton.kv.pool import DTYPES, KVPool, num_blocks_for
from baton.models.config import ModelConfig
from baton.models.loader import dummy_model, load_model, weights_fingerprint
from baton.models.registry import read_config
from baton.runtime.crew import Solo, Team
from baton.runtime.profile import measure_kv_memory, warm_up
from baton.runtime.runner import ModelRunner

logger = logging.getLogger(__name__)
_DEFAULTS = {"cpu": (16, 512, 64), "cuda": (64, 8192, 256)}  # block size; tokens and requests of a step


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Of a rank: its share of the model, and of the blocks' heads."""

    config: ModelConfig
    runner: ModelRunner
    pool: KVPool
    layout: KVLayout  # of whole blocks
    fingerprint: str
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    cores: int  # that this process computes steps on; 0: a GPU computes them


def load(model: Path, settings: EngineConfig, team: Team | None = None) -> LoadedModel:
    """Reads the weights and allocates the KV cache. Of a team's ranks each calls this, and waits for the others where they compute
    together. Raises ModelError for a folder that can't be served, ConfigError for settings that don't fit it."""
    team, kind = team or Solo(), device_kind(settings.device)
    wanted = (settings.block_size, settings.max_num_batched_tokens, settings.max_num_seqs)
    block_size, budget, seqs = (given or default for given, default in zip(wanted, _DEFAULTS[kind], strict=True))
    if block_size & (block_size - 1) or (kind == "cuda" and block_size < 16):
        raise ConfigError(f"engine.block_size={block_size}: it must be a power of two, and 16 at least on CUDA")
    config = read_config(model)
    device = torch.device(kind)
    group = team.join(device)
    size = group.size
    threads = settings.num_threads or max((os.cpu_count() or 1) // size, 1)
    torch.set_num_threads(threads)
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
    if kernels.decoder is not None and size > 1:
        kernels = dataclasses.replace(kernels, decoder=None)  # ranks meet in the middle of each layer
    if dummy:
        network = dummy_model(config, dtype=DTYPES[dtype], device=device, group=group)
    else:
        network = load_model(model, config, dtype=DTYPES[dtype], device=device, group=group)
    longest = min(settings.max_model_len or config.max_model_len, config.max_model_len)
    network.prepare(kernels, longest)
    own = layout.share(size)
    warm_up(network, own, device, num_tokens=min(budget, longest))
    num_blocks = settings.num_blocks
    if num_blocks is None:
        if settings.kv_memory is not None:
            memory = settings.kv_memory // size
        else:
            memory = measure_kv_memory(network, own, device, num_tokens=budget, share=settings.gpu_memory_utilization)
        num_blocks = group.least(num_blocks_for(own, memory))
    max_model_len = min(longest, num_blocks * block_size)
    pool = KVPool(own, num_blocks, device)
    runner = ModelRunner(
        network,
        pool,
        kernels,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        graphs=kind == "cuda" and kernels is not TORCH,  # torch's attention asks the host for lengths
        team=team,
    )
    logger.info(
        "%s on %s in %s: %d KV blocks of %d tokens, %d bytes each; at most %d tokens a request; fingerprint %s",
        model.name, device, dtype, num_blocks, block_size, own.block_bytes, max_model_len, fingerprint,
    )  # fmt: skip
    cores = 0 if kind == "cuda" else min(threads, len(os.sched_getaffinity(0)))
    return LoadedModel(config, runner, pool, layout, fingerprint, max_model_len, budget, seqs, cores)


def check_degree(config: ModelConfig, size: int) -> None:
    """Raises ConfigError where `size` ranks can't share the model."""
    together = math.gcd(config.num_heads, config.num_kv_heads, config.intermediate_size)
    if together % size:
        possible = ", ".join(str(count) for count in range(1, together + 1) if together % count == 0)
        raise ConfigError(
            f"engine.tensor_parallel_size={size} does not divide the model's {config.num_heads} attention heads, {config.num_kv_heads} KV "
            f"heads and {config.intermediate_size} columns of the MLP; possible: {possible}"
        )


def check_devices(size: int, kind: str) -> None:
    """Raises ConfigError where `size` ranks have no device each on this machine."""
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(
            f"engine.tensor_parallel_size={size} needs as many GPUs, and CUDA_VISIBLE_DEVICES shows this worker "
            f"{torch.cuda.device_count()}; parallel.launcher=ray brings those of other machines"
        )


def device_kind(asked: str) -> str:
    """cpu or cuda."""
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError(
            "engine.device=cuda, but torch finds no CUDA device here; use engine.device=cpu, or install a CUDA build of torch"
        )
    return "cuda" if asked != "cpu" and available else "cpu"

"""What is to be known of a model on this device before it serves: how much memory the KV cache may have."""

import torch

from baton.forward import ForwardBatch
from baton.kv.layout import KVLayout
from baton.kv.pool import KVPool
from baton.models.decoder import Decoder

_CPU_BYTES = 256 * 2**20
_RESERVE_BYTES = 1 * 2**30  # graphs, workspaces, fragmentation


def measure_kv_memory(model: Decoder, layout: KVLayout, device: torch.device, *, num_tokens: int, share: float) -> int:
    """Bytes for this rank. On CUDA: `share` of the GPU's memory, less what is in use by whomever, less what a step of `num_tokens` tokens
    needs on top, which is measured by computing one."""
    if device.type != "cuda":
        return _CPU_BYTES // model.group.size
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _step(model, KVPool(layout, 2, device), num_tokens)
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return max(int(total * share) - (total - free) - needed - _RESERVE_BYTES, 0)


def warm_up(model: Decoder, layout: KVLayout, device: torch.device, *, num_tokens: int) -> None:
    """Compiles and chooses what prompts need, short and of `num_tokens` tokens, so that no request pays for it."""
    if device.type == "cuda":
        pool = KVPool(layout, 2, device)
        _step(model, pool, 2)
        _step(model, pool, num_tokens)


@torch.inference_mode()
def _step(model: Decoder, pool: KVPool, num_tokens: int) -> None:
    """One prompt, whose KV goes nowhere, over a table of one and the same block."""
    device, kv = pool.tensor.device, pool.tensor
    model(
        ForwardBatch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            slots=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
            query_start=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            context_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            block_tables=torch.zeros(1, -(-num_tokens // kv.shape[4]), dtype=torch.int32, device=device),
            logits_rows=torch.tensor([num_tokens - 1], device=device),
            logits_owners=torch.tensor([0], device=device),
            max_query_len=num_tokens,
            max_context_len=num_tokens,
            lengths=((num_tokens, num_tokens),),
            kv=kv,
        )
    )

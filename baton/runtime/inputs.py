"""StepPlan → ForwardBatch: the tensors of one step."""

import torch

from baton.forward import ForwardBatch
from baton.scheduling.plan import ScheduledRequest, StepPlan


def build_inputs(plan: StepPlan, kv: torch.Tensor) -> ForwardBatch:
    """Rows wanted: each sampling request's last; all of the prompt where prompt logprobs are asked for. In the plan's order."""
    block_size = kv.shape[4]
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    rows: list[int] = []
    for item in plan.scheduled:
        request, end = item.request, item.start + item.num_new_tokens
        token_ids += request.token_ids[item.start : end]
        positions += range(item.start, end)
        slots += [request.block_ids[p // block_size] * block_size + p % block_size for p in range(item.start, end)]
        rows += [starts[-1] + position - item.start for position in wanted_positions(item)]
        starts.append(len(token_ids))
    tables = [item.request.block_ids for item in plan.scheduled]
    most = max(map(len, tables))
    device = kv.device
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        query_start=tuple(starts),
        context_lens=tuple(item.start + item.num_new_tokens for item in plan.scheduled),
        block_tables=torch.tensor([table + [0] * (most - len(table)) for table in tables], device=device),
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        kv=kv,
    )


def wanted_positions(item: ScheduledRequest) -> list[int]:
    """Positions whose logits are needed: those that predict a prompt token whose logprob is asked for, then the last known one."""
    request, end = item.request, item.start + item.num_new_tokens
    wanted = [] if request.sampling.prompt_logprobs is None else list(range(item.start, min(end, request.num_prompt_tokens - 1)))
    return [*wanted, end - 1] if item.samples else wanted

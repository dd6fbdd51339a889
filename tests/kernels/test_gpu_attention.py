"""Paged attention on the GPU against the torch twin in fp64."""

import pytest
import torch

from tests.kernels.gpu_cases import LAYER, Case, assert_near, paged_case, poison

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BORDERS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 2047, 2049, 4096, 5000]
FORMS = [  # heads, KV heads, head_dim, block_size, dtype
    (4, 4, 64, 16, torch.float32),
    (8, 2, 128, 64, torch.float32),
    (7, 1, 64, 16, torch.bfloat16),
    (14, 2, 128, 64, torch.bfloat16),
    (8, 2, 128, 16, torch.bfloat16),
    (2, 2, 128, 16, torch.bfloat16),
]
forms = pytest.mark.parametrize(("heads", "kv_heads", "dim", "size", "dtype"), FORMS)


def attend(case: Case, window: int | None, slack: int = 0, workspace: torch.Tensor | None = None) -> torch.Tensor:
    from baton.kernels.attention import paged_attention

    out = poison(tuple(case.q.shape), case.q.dtype)
    lists = (case.block_tables, case.query_start, case.context_lens, case.max_query_len, case.max_context_len + slack)
    result = paged_attention(case.q, case.kv, LAYER, *lists, window, out, workspace)
    assert result is out
    return result


@pytest.mark.parametrize("window", [None, 1, 37, 1001])
@forms
def test_one_token_each(heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype, window: int | None) -> None:
    case = paged_case(BORDERS, [1] * len(BORDERS), heads, kv_heads, dim, size, dtype)
    for slack in (0, 100_000):
        assert_near(attend(case, window, slack), case.expected(window))


@pytest.mark.parametrize("window", [None, 1, 37, 1001])
@forms
def test_prompts_and_chunks(heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype, window: int | None) -> None:
    contexts = [1, 130, 257, 1000, 64, 2049]
    for new in ([1, 130, 257, 1000, 64, 2049], [1, 29, 1, 999, 17, 700], [1, 2, 3, 4, 5, 6]):
        case = paged_case(contexts, new, heads, kv_heads, dim, size, dtype)
        assert_near(attend(case, window), case.expected(window))


def test_prefill_without_the_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from baton.kernels import attention

    monkeypatch.setattr(attention, "_hopper", lambda: None)
    for heads, kv_heads, dim, size in ((8, 2, 128, 16), (7, 1, 64, 64)):
        case = paged_case([1, 130, 257, 1000, 2049], [1, 29, 257, 999, 700], heads, kv_heads, dim, size, torch.bfloat16)
        for window in (None, 37):
            assert_near(attend(case, window), case.expected(window))


def test_one_prompt_alone() -> None:
    for length in (17, 128, 513, 5000):
        case = paged_case([length], [length], 8, 2, 128, 16, torch.bfloat16)
        assert_near(attend(case, None), case.expected(None))


def test_many_sequences_of_all_kinds() -> None:
    """More sequences than the search for a tile's sequence looks at at once."""
    contexts = [(s * 37) % 300 + 1 for s in range(200)]
    new = [min(context, (s * s) % 7 * (s % 3) + 1) for s, context in enumerate(contexts)]
    case = paged_case(contexts, new, 8, 2, 128, 16, torch.bfloat16)
    assert_near(attend(case, None), case.expected(None))


def test_padding_is_harmless() -> None:
    """Sequences without rows, and rows whose sequence has no context."""
    case = paged_case([40, 1, 300, 1, 1], [1, 1, 1, 1, 1], 8, 2, 128, 16, torch.bfloat16)
    expected = case.expected(None)
    lens, starts = case.context_lens.clone(), case.query_start.clone()
    lens[3:] = 0
    starts[4:] = starts[4]
    for longest in (1, 64):
        padded = Case(case.q, case.kv, case.block_tables, starts, lens, longest, case.max_context_len)
        assert_near(attend(padded, None)[:3], expected[:3])


def test_captured_graph_serves_other_lengths() -> None:
    """Captured once with upper bounds; lengths and blocks change between replays, and the workspace is as before after each."""
    from baton.kernels.attention import decode_workspace, paged_attention

    cases = [paged_case([1 + n * 7, 900 * n + 1, 5000 // (n + 1)], [1, 1, 1], 8, 2, 128, 16, torch.bfloat16, seed=n) for n in range(4)]
    blocks, width = max(c.kv.shape[0] for c in cases), max(c.block_tables.shape[1] for c in cases)
    kv, q = poison((blocks, *cases[0].kv.shape[1:]), torch.bfloat16), cases[0].q.clone()
    tables, lens = torch.zeros(3, width, dtype=torch.int32, device="cuda"), cases[0].context_lens.clone()
    workspace = decode_workspace(3, 2, 128, q.device)
    out = poison(tuple(q.shape), torch.bfloat16)

    def call() -> None:
        paged_attention(q, kv, LAYER, tables, cases[0].query_start, lens, 1, 16384, None, out, workspace)

    def load(case: Case) -> None:
        kv[: case.kv.shape[0]], lens[:], q[:] = case.kv, case.context_lens, case.q
        tables[:, : case.block_tables.shape[1]] = case.block_tables

    load(cases[0])
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for case in cases * 2:
        load(case)
        out.fill_(torch.nan)
        graph.replay()
        graph.replay()
        assert_near(out, case.expected(None))


def test_prefill_through_flash_attention() -> None:
    """Mixed batches: prompts through the package, single tokens through the project's kernel, and no NaN from anybody's neighbours."""
    from baton.kernels import flash

    if flash.unavailable():
        pytest.skip(f"{flash.unavailable()}")
    contexts, new = [130, 1, 1100, 257, 64, 2049, 300], [130, 1, 1099, 1, 17, 700, 3]
    for heads, kv_heads, dim, size in ((8, 2, 128, 16), (14, 2, 64, 64)):
        case = paged_case(contexts, new, heads, kv_heads, dim, size, torch.bfloat16)
        lists = (case.block_tables, case.query_start, case.context_lens, case.max_query_len, case.max_context_len)
        assert_near(flash.flash_paged_attention(case.q, case.kv, LAYER, *lists), case.expected(None))
        out = poison(tuple(case.q.shape), torch.bfloat16)
        few = flash.few_queries(case.q, case.kv)
        keys = flash.dense_keys(case.query_start, case.context_lens, few, sum(contexts))
        assert flash.flash_paged_attention(case.q, case.kv, LAYER, *lists, out=out, keys=keys) is out
        assert_near(out, case.expected(None))
        assert_near(flash.flash_paged_attention(case.q, case.kv, LAYER, *lists, window=37), case.expected(37))


def test_repeated_calls_agree() -> None:
    """The order in which a sequence's parts arrive does not show."""
    case = paged_case([4999, 3000], [1, 1], 32, 8, 128, 16, torch.bfloat16)
    first = attend(case, None)
    assert all(torch.equal(first, attend(case, None)) for _ in range(20))

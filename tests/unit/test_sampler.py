"""The sampler: every stage against a plain reference, draws against their distribution, and nothing but (seed, position) matters."""

import math
import random
from collections import Counter

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from baton.runtime.sampler import Row, _bias, _penalise, exponential_noise, logprobs, sample
from baton.types import SamplingParams

VOCAB = 97
EOS = frozenset({2})


def row(prompt=(5, 6, 7), output=(), **params) -> Row:
    sampling = SamplingParams(**{"max_tokens": 100, **params})
    return Row(params=sampling, token_ids=[*prompt, *output], num_prompt_tokens=len(prompt), eos_token_ids=EOS)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def ids(tokens) -> list[int]:
    return [token.token_id for token in tokens]


def draws(logits: torch.Tensor, count: int, **params) -> torch.Tensor:
    """Tokens drawn for the same logits [vocab] at `count` positions."""
    rows = [
        Row(params=SamplingParams(max_tokens=1, **params), token_ids=range(n), num_prompt_tokens=n, eos_token_ids=EOS) for n in range(count)
    ]
    return torch.tensor(ids(sample(logits.expand(count, -1), rows)))


def reachable(logits: torch.Tensor, count: int = 4000, **params) -> set[int]:
    """Ids that come out for nearly flat logits, so that every allowed one does."""
    return set(draws(logits, count, **params).tolist())


def reference(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Logits [vocab] that the draw sees, one token at a time, in the words of the vLLM documentation."""
    p, values = row.params, logits.double().tolist()
    for token_id, bias in p.logit_bias.items():
        values[token_id] += bias
    output = list(row.token_ids[row.num_prompt_tokens :])
    if len(output) < p.min_tokens:
        for token_id in (*p.stop_token_ids, *row.eos_token_ids):
            values[token_id] = -math.inf
    for token_id in set(row.token_ids):
        values[token_id] *= 1 / p.repetition_penalty if values[token_id] > 0 else p.repetition_penalty
    for token_id, count in Counter(output).items():
        values[token_id] -= p.frequency_penalty * count + p.presence_penalty
    if p.temperature == 0:
        return torch.tensor(values)
    scores = torch.tensor(values)[None] / p.temperature
    if p.min_p:
        scores = MinPLogitsWarper(p.min_p)(None, scores)
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(None, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(None, scores)
    return scores[0]


def reference_token(logits: torch.Tensor, row: Row) -> int:
    scores = reference(logits, row)
    if row.params.temperature == 0:
        return int(scores.argmax())
    noise = sample_noise(row, len(logits))
    return int((scores - noise.log()).argmax())


def sample_noise(row: Row, vocab: int) -> torch.Tensor:
    """The exponential noise that a row's draw uses, by splitmix64 on Python integers."""

    def mix(value: int) -> int:
        value &= 2**64 - 1
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix(row.params.seed * golden + mix(len(row.token_ids) + 1))
    uniform = [(mix(key + golden * (column + 1)) >> 1) * 2.0**-63 for column in range(vocab)]
    return -torch.log1p(-torch.tensor(uniform, dtype=torch.double).clamp(2.0**-64, 1 - 2.0**-24))


def random_row(rng: random.Random) -> Row:
    def maybe(value, off):
        return value if rng.random() < 0.5 else off

    return row(
        prompt=[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))],
        output=[rng.randrange(VOCAB) for _ in range(rng.randint(0, 30))],
        seed=rng.randrange(2**63),
        temperature=maybe(rng.uniform(0.2, 2), 0.0) if rng.random() < 0.5 else 1.0,
        top_k=maybe(rng.randint(1, VOCAB + 5), 0),
        top_p=maybe(rng.uniform(0.05, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.5), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe({rng.randrange(VOCAB): rng.uniform(-10, 10) for _ in range(3)}, {}),
        min_tokens=maybe(rng.randint(0, 40), 0),
        stop_token_ids=maybe((rng.randrange(VOCAB), 2), ()),
    )


# ---- one stage at a time


def test_temperature_zero_is_argmax_and_the_lowest_of_equals():
    logits = random_logits(8)
    logits[3, [10, 40, 80]] = 50.0
    assert ids(sample(logits, [row(temperature=0)] * 8)) == logits.argmax(-1).tolist()
    assert sample(logits, [row(temperature=0)] * 8)[3].token_id == 10


def test_tiny_temperature_is_greedy():
    logits = random_logits(4) * 100
    assert ids(sample(logits, [row(temperature=1e-40)] * 4)) == logits.argmax(-1).tolist()
    assert ids(sample(logits, [row(temperature=2e-5)] * 4)) == logits.argmax(-1).tolist()


def test_logits_are_left_as_they_are():
    logits = random_logits(3)
    kept = logits.clone()
    rng = random.Random(1)
    sample(logits, [random_row(rng) for _ in range(3)])
    assert torch.equal(logits, kept)


def test_top_k_keeps_k_and_their_equals():
    logits = torch.zeros(VOCAB)
    logits[[3, 4, 5]] = torch.tensor([0.3, 0.2, 0.1])
    assert reachable(logits, top_k=2) == {3, 4}
    logits[[7, 8]] = 0.2
    assert reachable(logits, top_k=2) == {3, 4, 7, 8}
    assert len(reachable(logits, top_k=VOCAB + 1)) == VOCAB


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert reachable(logits, top_p=0.35) == {3}
    assert reachable(logits, top_p=0.5) == {3, 2}
    assert reachable(logits, top_p=0.85) == {3, 2, 1}
    assert reachable(logits, top_p=0.95) == {3, 2, 1, 0}
    assert reachable(logits, top_p=1e-6) == {3}


def test_top_p_takes_lower_ids_of_equals_first():
    assert reachable(torch.zeros(10), top_p=0.35) == {0, 1, 2, 3}


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert reachable(logits, top_k=2, top_p=0.6) == {3, 2}  # 0.4 / 0.7 < 0.6
    assert reachable(logits, top_k=2, top_p=0.5) == {3}


def test_min_p_is_relative_to_the_likeliest_after_temperature():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert reachable(logits, min_p=0.6) == {3, 2}
    assert reachable(logits, min_p=1.0) == {3}
    assert reachable(logits, min_p=0.6, temperature=3.0) == {3, 2, 1, 0}  # (0.1 / 0.4) ** (1 / 3) > 0.6


def test_repetition_penalty_counts_prompt_and_output_as_hugging_face_does():
    logits = random_logits(2)
    rows = [row(prompt=(1, 1, 9), output=(4, 4), temperature=0, repetition_penalty=penalty) for penalty in (1.7, 0.4)]
    for at, (values, made) in enumerate(zip(logits, rows, strict=True)):
        expected = RepetitionPenaltyLogitsProcessor(made.params.repetition_penalty)(torch.tensor([[1, 1, 9, 4, 4]]), values[None].clone())
        assert torch.allclose(reference(values, made).float(), expected[0])
        assert sample(logits, rows)[at].token_id == int(expected.argmax())


@pytest.mark.parametrize(("name", "outputs", "expected"), [("presence_penalty", 3, 1.0), ("frequency_penalty", 3, 3.0)])
def test_presence_and_frequency_penalties_count_the_output_alone(name, outputs, expected):
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 2.0  # in the prompt: not penalised
    assert sample(logits, [row(temperature=0, **{name: 1.0})])[0].token_id == 5
    logits[0, 5], logits[0, 8] = expected - 0.01, expected + 0.01  # 8 loses exactly `expected`
    assert sample(logits, [row(output=(8,) * outputs, temperature=0, **{name: 1.0})])[0].token_id == 5
    logits[0, 5] = 0.005
    assert sample(logits, [row(output=(8,) * outputs, temperature=0, **{name: 1.0})])[0].token_id == 8


def test_logit_bias_comes_before_penalties():
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, 5] = 1.0
    made = row(prompt=(5,), temperature=0, logit_bias={5: 1.0}, repetition_penalty=2.0)  # (1 + 1) / 2, not 1 / 2 + 1
    for rival, winner in ((1.01, 11), (0.99, 5)):
        logits[0, 11] = rival
        assert sample(logits, [made])[0].token_id == winner


def test_min_tokens_bans_eos_and_stop_ids_until_enough_are_out():
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 30], logits[0, 40] = 9.0, 8.0, 7.0

    def token(output: int) -> int:
        return sample(logits, [row(output=(50,) * output, temperature=0, min_tokens=3, stop_token_ids=(30,), logit_bias={2: 100.0})])[
            0
        ].token_id

    assert [token(output) for output in (0, 2, 3)] == [40, 40, 2]


# ---- all stages together


def test_mixed_rows_equal_the_reference_one_by_one():
    rng = random.Random(7)
    rows = [random_row(rng) for _ in range(400)]
    logits = random_logits(400, seed=7)
    assert ids(sample(logits, rows)) == [reference_token(values, made) for values, made in zip(logits, rows, strict=True)]


def test_a_row_draws_the_same_in_any_batch():
    rng = random.Random(3)
    rows = [random_row(rng) for _ in range(64)]
    logits = random_logits(64, seed=3)
    together = ids(sample(logits, rows))
    assert [sample(logits[at : at + 1], [made])[0].token_id for at, made in enumerate(rows)] == together
    order = list(range(64))
    rng.shuffle(order)
    assert ids(sample(logits[order], [rows[at] for at in order])) == [together[at] for at in order]


def test_noise_is_bitwise_the_same_in_any_batch_and_vocabulary():
    keys = [1, 2**63, 2**64 - 1, 0, 12345]
    whole = exponential_noise(keys, 1003, torch.device("cpu"))
    for at, key in enumerate(keys):
        for size in (1, 7, 64, 1003):
            assert torch.equal(exponential_noise([key], size, torch.device("cpu"))[0], whole[at, :size])
    assert bool(torch.isfinite(whole.log()).all())


def test_noise_never_changes_between_versions():
    """A migrated request continues on a worker of another version: these values are part of the protocol."""
    noise = exponential_noise([0, 42], 3, torch.device("cpu")).flatten().tolist()
    expected = [2.1482412815, 0.5648032427, 0.0267894249, 1.3531105518, 0.1742467284, 0.3265630901]
    assert noise == pytest.approx(expected, rel=1e-6)


# ---- rows that are kept while their sequences grow


def adjusted_at_once(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """What bias and penalties make of logits [R, vocab], computed from whole histories, in fp32 and in the sampler's order."""
    values = logits.clone()
    for at, made in enumerate(rows):
        p = made.params
        for token_id, bias in p.logit_bias.items():
            values[at, token_id] += torch.tensor(bias)
        values[at, list(made.banned)] = -torch.inf
        if p.repetition_penalty != 1:
            seen, penalty = torch.tensor(made.token_ids).unique(), torch.tensor(p.repetition_penalty)
            values[at, seen] = torch.where(values[at, seen] > 0, values[at, seen] / penalty, values[at, seen] * penalty)
        output, counts = torch.tensor(made.token_ids[made.num_prompt_tokens :], dtype=torch.int64).unique(return_counts=True)
        values[at, output] -= torch.tensor(p.frequency_penalty) * counts + torch.tensor(p.presence_penalty)
    return values


def test_rows_that_are_kept_draw_the_same_bits_as_new_ones():
    """Rows come and go, as requests do that wait, are preempted or end; new ones begin with some output, as moved ones do."""
    rng = random.Random(17)
    kept = [random_row(rng) for _ in range(24)]
    for step in range(60):
        chosen = rng.sample(kept, rng.randint(1, len(kept)))
        logits = random_logits(len(chosen), seed=step)
        fresh = [Row(params=r.params, token_ids=r.token_ids, num_prompt_tokens=r.num_prompt_tokens, eos_token_ids=EOS) for r in chosen]
        values = _penalise(_bias(logits, chosen), chosen)
        assert torch.equal(values, adjusted_at_once(logits, chosen))
        assert torch.equal(values, _penalise(_bias(logits, fresh), fresh))
        tokens = sample(logits, chosen)
        assert tokens == sample(logits, fresh)
        for made, token in zip(chosen, tokens, strict=True):
            made.token_ids.extend([token.token_id] * rng.choice((1, 1, 3)))
        kept[rng.randrange(len(kept))] = random_row(rng)


class Watched(list[int]):
    """Counts what is read of it."""

    num_read = 0

    def __iter__(self):
        self.num_read += len(self)
        return super().__iter__()

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found


def test_a_kept_row_reads_each_token_once():
    made = Row(
        params=SamplingParams(max_tokens=100, repetition_penalty=1.1, frequency_penalty=0.5),
        token_ids=Watched(range(50)),
        num_prompt_tokens=40,
        eos_token_ids=EOS,
    )
    for _ in range(20):
        made.token_ids.append(sample(random_logits(1), [made])[0].token_id)
    assert made.token_ids.num_read == 2 * len(made.token_ids) - 40 - 2  # the output for either kind of penalty; the last token not yet


# ---- distribution

CHI2_999 = {9: 27.88, 24: 51.18, 99: 148.23}  # 0.999 quantiles by degrees of freedom


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_softmax(seed, temperature):
    logits = random_logits(1, seed=11, vocab=10)[0] / 3
    count = 20_000
    observed = torch.bincount(draws(logits, count, seed=seed, temperature=temperature), minlength=10).float()
    assert chi_square(observed, (logits / temperature).softmax(-1) * count) < CHI2_999[9]


def test_seeds_of_one_position_follow_the_softmax():
    """What parallel samples (n > 1) see: neighbouring seeds, one position."""
    logits = random_logits(1, seed=12, vocab=10)[0] / 3
    count = 20_000
    rows = [row(seed=seed) for seed in range(count)]
    observed = torch.bincount(torch.tensor(ids(sample(logits.expand(count, -1), rows))), minlength=10).float()
    assert chi_square(observed, logits.softmax(-1) * count) < CHI2_999[9]


def test_filtered_draws_follow_the_softmax_of_what_is_left():
    logits = random_logits(1, seed=13, vocab=200)[0]
    count = 20_000
    keep = logits.topk(10).indices
    expected = torch.zeros(200).scatter(0, keep, logits[keep].softmax(-1) * count)
    observed = torch.bincount(draws(logits, count, top_k=10), minlength=200).float()
    assert observed[expected == 0].sum() == 0
    assert chi_square(observed[keep], expected[keep]) < CHI2_999[9]


def test_rare_tokens_come_as_often_as_they_should():
    """The tail depends on the noise's precision near 0: 200 ids share a probability of 0.003."""
    logits = torch.cat((torch.tensor([11.1]), torch.zeros(200)))
    count = 30_000
    rare = int((draws(logits, count, seed=5) > 0).sum())
    expected = count * 200 / (200 + math.exp(11.1))
    assert abs(rare - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("pair", ["positions", "seeds"])
def test_neighbouring_draws_are_independent(pair):
    """Joint counts of (draw, next draw) over 5 × 5 outcomes against the product of the margins."""
    logits, count = torch.zeros(5), 25_000
    first = draws(logits, count + 1, seed=9)
    first, second = (first[:-1], first[1:]) if pair == "positions" else (first, draws(logits, count + 1, seed=10))
    joint = torch.bincount(first * 5 + second, minlength=25).float()
    assert chi_square(joint, torch.full((25,), len(first) / 25)) < CHI2_999[24]


def test_noise_is_uncorrelated_between_columns():
    noise = exponential_noise([random.Random(key).getrandbits(64) for key in range(4000)], 40, torch.device("cpu"))
    assert abs(float(noise.mean()) - 1) < 0.01
    assert abs(float(noise.var()) - 1) < 0.03
    correlation = torch.corrcoef(noise.T) - torch.eye(40)
    assert float(correlation.abs().max()) < 5 / math.sqrt(4000)


# ---- logprobs


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(3)
    rows = [
        row(temperature=0, logprobs=4, logit_bias={17: 100.0}, repetition_penalty=2.0),
        row(temperature=0),
        row(temperature=2.0, logprobs=0, top_k=3),
    ]
    tokens = sample(logits, rows)
    expected = logits.log_softmax(-1)
    first = tokens[0].logprobs
    assert tokens[0].token_id == 17
    assert first.logprob == pytest.approx(float(expected[0, 17]))
    assert first.rank == 1 + int((logits[0] > logits[0, 17]).sum())
    best = logits[0].topk(4)
    assert [token_id for token_id, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected[0, best.indices].tolist())
    assert tokens[1].logprobs is None
    assert tokens[2].logprobs.top == ()
    assert tokens[2].logprobs.logprob == pytest.approx(float(expected[2, tokens[2].token_id]))


def test_logprobs_of_given_tokens_with_different_counts():
    logits = random_logits(3, seed=4)
    found = logprobs(logits, [0, 1, 2], [0, 2, VOCAB + 5])
    assert [len(entry.top) for entry in found] == [0, 2, VOCAB]
    assert found[1].logprob == pytest.approx(float(logits[1].log_softmax(-1)[1]))

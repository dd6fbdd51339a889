"""What must hold on a GPU. Run there with `python -m pytest tests/kernels`; elsewhere `make test` leaves these out by their mark."""

import random

import pytest

from baton.runtime.sampler import sample
from tests.unit.test_sampler import ids, random_logits, random_row

pytestmark = pytest.mark.gpu


def test_cuda_draws_what_the_cpu_draws() -> None:
    rng = random.Random(5)
    rows = [random_row(rng) for _ in range(512)]
    logits = random_logits(512, seed=5)
    assert ids(sample(logits.cuda(), rows)) == ids(sample(logits, rows))

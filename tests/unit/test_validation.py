"""What an engine refuses for its size: each entry costs every step."""

from typing import Any

import pytest

from baton.errors import InvalidRequest
from baton.runtime.validation import Limits, validate
from baton.types import GenerateRequest, SamplingParams

LIMITS = Limits(vocab_size=5000, max_model_len=100)


def check(**sampling: Any) -> None:
    validate(GenerateRequest(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=5, **sampling)), LIMITS, ())


@pytest.mark.parametrize(
    ("name", "most", "make"),
    [("logit_bias", 1024, lambda count: dict.fromkeys(range(count), 1.0)), ("stop_token_ids", 128, lambda count: tuple(range(count)))],
)
def test_lists_have_a_limit(name: str, most: int, make: Any) -> None:
    check(**{name: make(most)})
    with pytest.raises(InvalidRequest, match=f"{name} has {most + 1} entries; at most {most}") as caught:
        check(**{name: make(most + 1)})
    assert caught.value.param == name

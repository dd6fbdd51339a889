"""Fixtures that every suite may use. Clusters are real: `baton up` in processes of its own, from tests/cluster.py."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from baton.tokenizer import Tokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return REPOSITORY / "examples" / "demo-model"


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path) -> "Tokenizer":
    from baton.tokenizer import Tokenizer

    return Tokenizer(demo_model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, in fp32, with a tokenizer of bytes."""
    from baton.models.create import create_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    create_model(folder, "llama", max_len=1024)
    return folder

"""Errors, configuration, hashing, conversion and metrics."""

import hashlib
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import EngineConfig, KVStoreConfig, RouterConfig, WorkerConfig, load_config, served_names
from baton.errors import BatonError, ConfigError, WorkerLost, error_classes
from baton.hashing import HASH_BYTES, block_hashes, root_hash
from baton.kv.layout import KVLayout, block_key
from baton.metrics import RouterMetrics, WorkerMetrics
from baton.rpc import convert
from baton.types import (
    BlocksRemoved,
    BlocksStored,
    CacheReport,
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    Load,
    Member,
    MemberState,
    OutputToken,
    Role,
    SamplingParams,
    StateUpdate,
    TokenLogprobs,
)

# -- errors


def test_every_error_has_a_wire_form() -> None:
    for code, cls in error_classes().items():
        assert code == cls.code
        assert hasattr(grpc.StatusCode, cls.grpc_status)
        assert 400 <= cls.http_status < 600


class _FailedCall(grpc.aio.AioRpcError):
    def __init__(self, error: BatonError | None, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        status, message, metadata = convert.error_status(error) if error else (code, "Socket closed", ())
        super().__init__(status, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), message)


def test_errors_survive_the_wire() -> None:
    for cls in error_classes().values():
        found = convert.error_from_rpc(_FailedCall(cls("what to do", param="prompt")), "decode-0")
        assert (type(found), found.message, found.param) == (cls, "what to do", "prompt")


def test_a_status_that_is_not_ours_means_a_lost_worker() -> None:
    for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
        assert isinstance(convert.error_from_rpc(_FailedCall(None, code), "decode-0"), WorkerLost)


# -- configuration


def test_unknown_keys_name_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key engine.blok_size; did you mean block_size\?"):
        load_config(WorkerConfig, None, ["engine.blok_size=3"], {})


def test_sources_win_in_order(tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text("engine: {block_size: 8, kv_memory: 1GiB, max_num_seqs: 3}\nrole: decode\n")
    environ = {"BATON_ENGINE__BLOCK_SIZE": "32", "BATON_SERVER__ID": "from-env", "BATON_UNRELATED": "x"}
    config = load_config(WorkerConfig, path, ["server.id=from-flag"], environ)
    assert (config.engine.block_size, config.engine.kv_memory, config.engine.max_num_seqs) == (32, 2**30, 3)
    assert (config.server.id, config.role) == ("from-flag", Role.DECODE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("engine: 5", "engine"),
        ("policy: psychic", "policy"),
        ("http_port: 99999", "http_port"),
        ("hedging: {share: 0.1}", r"hedging\.share says nothing without hedging\.after"),
        ("hedging: {after: 1}", r"hedging\.after: .* greater than 1"),
        ("hedging: {after: 2, share: 0}", r"hedging\.share"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(RouterConfig, path, (), {})


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(KVStoreConfig, None, ["mode=both", "client_ttl_s=0"], {})
    assert "mode" in caught.value.message
    assert "client_ttl_s" in caught.value.message


@pytest.mark.parametrize("cls", [RouterConfig, WorkerConfig])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/prod", "prod"),
        ("models/prod/", "prod"),
        ("models/prod/../other/.", "other"),
        ("hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd6066d109eabc6255188de91218", "Qwen/Qwen3-8B"),
        ("hub/models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2"),
        ("models--Qwen--Qwen3-8B", "models--Qwen--Qwen3-8B"),
    ],
)
def test_a_model_is_named_like_its_folder_as_given(
    cls: type[RouterConfig | WorkerConfig], folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of-today").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "prod").symlink_to(tmp_path / "of-today")
    assert served_names(cls(model=folder)) == (name,)
    assert served_names(cls(model=str(tmp_path / folder))) == (name,)


@pytest.mark.parametrize(
    ("text", "names"), [("one", ("one",)), ("[one, org/two]", ("one", "org/two")), ("''", ("folder",)), ("[]", ("folder",))]
)
def test_a_model_has_one_name_or_several(text: str, names: tuple[str, ...]) -> None:
    for cls in (RouterConfig, WorkerConfig):
        assert served_names(load_config(cls, None, ["model=/the/folder", f"served_model_name={text}"], {})) == names


def test_no_name_of_a_model_is_empty() -> None:
    with pytest.raises(ConfigError, match=r"served_model_name.1: .* at least 1 character"):
        load_config(RouterConfig, None, ["served_model_name=[a, '']"], {})


def test_configurations_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        EngineConfig().block_size = 3  # type: ignore[misc]


# -- hashing


def test_hashes_are_what_the_documentation_says() -> None:
    root = hashlib.sha256(b"baton:").digest()[:16]
    first = hashlib.sha256(root + b"\x01\0\0\0\x02\0\0\0").digest()[:16]
    assert root_hash() == root
    assert block_hashes([1, 2, 3], 2) == [first]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 9), st.text(max_size=5), st.integers(0, 9))
def test_hashes_can_be_continued(token_ids: list[int], block_size: int, salt: str, cut: int) -> None:
    whole = block_hashes(token_ids, block_size, salt)
    assert len(whole) == len(token_ids) // block_size
    assert all(len(item) == HASH_BYTES for item in whole)
    assert block_hashes(token_ids, block_size, salt, known=whole[:cut]) == whole


def test_hashes_are_equal_in_another_process() -> None:
    code = "from baton.hashing import block_hashes; print(b''.join(block_hashes(range(100), 16, 'salt')).hex())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}).stdout
    assert printed.strip() == b"".join(block_hashes(range(100), 16, "salt")).hex()


def test_the_fingerprint_covers_what_must_be_equal() -> None:
    layout = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "dtype": "float32"}
    prints = {KVLayout(**layout).fingerprint("weights"), KVLayout(**layout).fingerprint("others")}
    prints |= {
        KVLayout(**{**layout, **change}).fingerprint("weights") for change in ({"block_size": 8}, {"dtype": "bfloat16"}, {"head_dim": 16})
    }
    assert len(prints) == 5
    assert block_key("f", b"\x01" * 16, 1, 4) == "f/1of4/" + "01" * 16


# -- conversion

floats = st.floats(-100, 100, width=32)
ids = st.integers(0, 2**31)
logprobs = st.builds(TokenLogprobs, floats, ids, st.lists(st.tuples(ids, floats), max_size=3).map(tuple))
tokens = st.lists(st.builds(OutputToken, ids, st.none() | logprobs), max_size=3).map(tuple)
sampling = st.builds(
    SamplingParams,
    max_tokens=ids,
    seed=st.integers(0, 2**63 - 1),
    temperature=floats,
    top_k=ids,
    top_p=floats,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    logit_bias=st.dictionaries(ids, floats, max_size=3),
    min_tokens=ids,
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | ids,
    prompt_logprobs=st.none() | ids,
)
texts = st.text(max_size=8)
requests = st.builds(
    GenerateRequest,
    request_id=texts,
    prompt_token_ids=st.lists(ids, max_size=5).map(tuple),
    sampling=sampling,
    output_token_ids=st.lists(ids, max_size=3).map(tuple),
    salt=texts,
    traceparent=texts,
)
reports = st.builds(CacheReport, num_prompt_tokens=ids, num_local_tokens=ids, num_pool_tokens=ids, num_prefill_tokens=ids)
outputs = st.builds(
    GenerateOutput,
    tokens=tokens,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | ids,
    prompt_logprobs=st.lists(st.none() | logprobs, max_size=3).map(tuple),
    num_computed_tokens=ids,
    num_saved_blocks=ids,
    cache=st.none() | reports,
)
members = st.builds(
    Member,
    id=texts,
    role=st.sampled_from(Role),
    address=texts,
    state=st.sampled_from(MemberState),
    pid=ids,
    model=texts,
    fingerprint=texts,
    block_size=ids,
    num_blocks=ids,
    max_model_len=ids,
    metrics_address=texts,
)
hashes = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple)
updates = st.builds(
    StateUpdate,
    sequence=ids,
    state=st.sampled_from(MemberState),
    load=st.builds(Load, num_running=ids, num_waiting=ids, num_waiting_tokens=ids, blocks_total=ids, blocks_free=ids, blocks_cached=ids),
    events=st.lists(st.builds(BlocksStored, hashes) | st.builds(BlocksRemoved, hashes), max_size=3).map(tuple),
    snapshot=st.booleans(),
)


@given(requests, outputs, members, updates)
def test_everything_survives_the_wire(request: GenerateRequest, output: GenerateOutput, member: Member, update: StateUpdate) -> None:
    assert convert.request_from_proto(convert.request_to_proto(request)) == request
    assert convert.output_from_proto(convert.output_to_proto(output)) == output
    assert convert.member_from_proto(convert.member_to_proto(member)) == member
    assert convert.state_from_proto(convert.state_to_proto(update)) == update


# -- metrics and imports


def test_vllms_names_are_exported_beside_ours() -> None:
    worker = WorkerMetrics("m", "decode-0", lambda: Load(num_running=3, blocks_total=10, blocks_free=4), lambda: {"blocks_saved": 5.0})
    page = worker.exposition().decode()
    for name in ("baton:num_requests_running", "vllm:num_requests_running"):
        assert f'{name}{{model_name="m",worker="decode-0"}} 3.0' in page
    assert 'vllm:kv_cache_usage_perc{model_name="m",worker="decode-0"} 0.6' in page
    assert 'baton:kv_pool_saved_blocks_total{model_name="m",worker="decode-0"} 5.0' in page
    assert "# TYPE baton:kv_pool_saved_blocks_total counter" in page
    assert "vllm:kv_pool" not in page
    assert "vllm:generation_tokens" not in page, "routers tell that, for all of their workers"
    router = RouterMetrics("m")
    router.time_to_first_token.observe(0.2)
    router.success("stop")
    page = router.exposition().decode()
    assert 'vllm:time_to_first_token_seconds_count{model_name="m",worker="router"} 1.0' in page
    assert 'vllm:request_success_total{finished_reason="stop",model_name="m",worker="router"} 1.0' in page
    assert 'vllm:generation_tokens_total{model_name="m",worker="router"} 0.0' in page


@pytest.mark.parametrize("module", ["services.router.__main__", "services.kvstore.__main__", "baton.cli.app", "baton.cli.cluster"])
def test_light_processes_never_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

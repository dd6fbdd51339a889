"""A plain gRPC client against a running cluster."""

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.rpc.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.cluster import RunningCluster

GREEDY = common_pb2.SamplingParams(max_tokens=12, temperature=0)


async def generate(cluster: RunningCluster, request: router_pb2.RouterGenerateRequest) -> list[router_pb2.RouterGenerateResponse]:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        return [answer async for answer in router_pb2_grpc.RouterStub(channel).Generate(request)]


async def test_text_token_ids_and_chat_give_what_http_gives(cluster: RunningCluster) -> None:
    text = router_pb2.RouterGenerateRequest(text="The router", sampling=GREEDY)
    async with httpx.AsyncClient(base_url=cluster.url) as http:
        ids = (await http.post("/tokenize", json={"prompt": "The router"})).json()["tokens"]
        over_http = (await http.post("/v1/completions", json={"prompt": "The router", "max_tokens": 12, "temperature": 0})).json()
    tokens = router_pb2.RouterGenerateRequest(token_ids=router_pb2.TokenIds(ids=ids), sampling=GREEDY)
    for request in (text, tokens):
        answers = await generate(cluster, request)
        assert "".join(answer.text for answer in answers) == over_http["choices"][0]["text"]
        assert answers[-1].usage.completion_tokens == over_http["usage"]["completion_tokens"]
        assert "decode=decode-0" in answers[-1].route
    chat = router_pb2.ChatMessages(messages=[router_pb2.ChatMessage(role="user", content="What is Baton?")])
    answers = await generate(cluster, router_pb2.RouterGenerateRequest(chat=chat, sampling=GREEDY, stop=["large"]))
    assert answers[-1].stop_reason in ("large", "")


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        (router_pb2.RouterGenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "input is missing"),
        (router_pb2.RouterGenerateRequest(text="x", model="other"), grpc.StatusCode.NOT_FOUND, "demo-model"),
        (router_pb2.RouterGenerateRequest(text="word " * 5000), grpc.StatusCode.INVALID_ARGUMENT, "4096"),
        (
            router_pb2.RouterGenerateRequest(text="x", sampling=common_pb2.SamplingParams(max_tokens=4096)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "ask for at most",
        ),
        (router_pb2.RouterGenerateRequest(text="x", stop=["a", ""]), grpc.StatusCode.INVALID_ARGUMENT, "must not be empty"),
    ],
)
async def test_errors_have_a_status_and_say_what_to_do(
    cluster: RunningCluster, request_: router_pb2.RouterGenerateRequest, status: grpc.StatusCode, says: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(cluster, request_)
    assert caught.value.code() is status
    assert says in (caught.value.details() or "")


async def test_health_and_reflection_on_every_service(cluster: RunningCluster) -> None:
    expected = {
        "prefill": "baton.rpc.v1.Prefill",
        "decode": "baton.rpc.v1.Decode",
        "kvstore": "baton.rpc.v1.KVStore",
        "router": "baton.rpc.v1.Router",
    }
    seen = cluster.status()
    for member in [*seen["workers"], *seen["others"]]:
        async with grpc.aio.insecure_channel(member["address"]) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            async for listed in stub.ServerReflectionInfo(iter([request])):
                names = {service.name for service in listed.list_services_response.service}
                assert expected[member["role"]] in names
                break

"""The protocol's calls over real sockets: what comes back, what is refused, models, time, keys and numbers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

from recofuse_protos.inference.v2 import inference_pb2 as pb
from recofuse_protos.inference.v2 import inference_pb2_grpc
from service.access.keys import FileKeys, Scope, new_key
from service.terms.errors import STATUS, ErrorCode
from service.terms.jobs import Part
from tests.fakes import FakeEngine, TellingCodec, file_of, pair, picture
from tests.service.conftest import Server, Serving
from tests.service.faces.oip.messages import (
    ALL_BINARY,
    FILES,
    INFER,
    IR,
    IR_FILE,
    LENGTH,
    PIXELS,
    VIS,
    VIS_FILE,
    Entry,
    files,
    grpc_message,
    message,
    outputs_of,
    post,
    refusal,
    tensor,
)

# what comes back


@pytest.mark.parametrize("inputs", [PIXELS, FILES], ids=["pixels", "files"])
async def test_a_pair_comes_back_as_tensors(server: Server, inputs: tuple[tuple[Entry, bytes], ...]) -> None:
    answer = await post(server.client, *inputs, id="mine", **ALL_BINARY)
    found = outputs_of(answer)
    batch = (1,) if inputs is FILES else ()
    assert {name: array.shape for name, array in found.items()} == {
        "fused": (*batch, 48, 64, 3), "vis_restored": (*batch, 48, 64, 3), "ir_restored": (*batch, 48, 64, 1),
    }  # fmt: skip
    np.testing.assert_array_equal(found["fused"].reshape(VIS.shape), VIS)
    np.testing.assert_array_equal(found["ir_restored"].reshape(IR.shape), IR)
    document = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert (document["model_name"], document["model_version"], document["id"]) == ("fake", "7", "mine")
    assert answer.headers["content-type"] == "application/octet-stream"


async def test_json_alone_does_as_well(server: Server) -> None:
    inputs: list[Entry] = [
        {"name": "vis", "datatype": "UINT8", "shape": [1, *VIS.shape], "data": VIS.tolist()},
        {"name": "ir", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(IR_FILE).decode()]},
    ]
    wanted = [{"name": "ir_restored"}, {"name": "fused", "parameters": {"binary_data": False}}]
    answer = await server.client.post(INFER, json={"inputs": inputs, "outputs": wanted})
    assert LENGTH not in answer.headers
    assert [entry["name"] for entry in answer.json()["outputs"]] == ["ir_restored", "fused"]
    found = outputs_of(answer)
    np.testing.assert_array_equal(found["fused"], VIS[None])
    np.testing.assert_array_equal(found["ir_restored"][0, ..., 0], IR)


async def test_only_what_is_wanted_is_made(server: Server) -> None:
    for wanted, parts in {"fused": (Part.FUSED,), "vis_restored": (Part.VIS,), "ir_restored": (Part.IR,)}.items():
        found = outputs_of(await post(server.client, *PIXELS, outputs=[{"name": wanted}]))
        assert list(found) == [wanted]
        assert tuple(server.engine.options[-1].parts) == parts


async def test_mixed_answers_and_files(server: Server) -> None:
    wanted = [{"name": "fused", "parameters": {"binary_data": True}}, {"name": "ir_restored"}]
    found = outputs_of(await post(server.client, *FILES, outputs=wanted, parameters={"format": "png"}))
    fused, ir = (
        np.asarray(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED))
        for (content,) in found.values()
    )
    np.testing.assert_array_equal(fused[..., ::-1], VIS)
    np.testing.assert_array_equal(ir, IR)


async def test_parameters_reach_the_engine(server: Server) -> None:
    given = {"seed": 99, "steps": "17", "sampler": "euler", "ir_range": "30,90", "timeout": 5_000_000, "priority": 1}
    given |= {"vis_range": "20,180.5", "binary_data_output": True}
    found = outputs_of(await post(server.client, *PIXELS, parameters=given))
    np.testing.assert_array_equal(found["vis_restored"], np.rint(np.clip((VIS - 20.0) / 160.5, 0, 1) * 255))
    np.testing.assert_array_equal(found["ir_restored"][..., 0], np.rint(np.clip((IR - 30.0) / 60, 0, 1) * 255))
    assert server.engine.batches[-1] == [99]
    assert (server.engine.options[-1].steps, server.engine.options[-1].sampler) == (17, "euler")
    for more, expected in (
        ({"exposure": "as_shot"}, "as_shot"), ({"exposure": "lit"}, "lit"), ({}, server.engine.info.default_exposure),
        ({"exposure": None}, server.engine.info.default_exposure),
    ):  # fmt: skip
        await post(server.client, *PIXELS, parameters=more)
        assert server.engine.options[-1].exposure == expected


async def test_each_pair_of_a_batch_is_a_job(server: Server) -> None:
    """They come back in their order, each as it would alone, with rows of different pairs never mixed."""
    views = [picture(seed=seed) for seed in range(5)]
    thermal = np.stack([picture(channels=1, seed=seed) for seed in range(5)])[..., None]
    for inputs in (
        (tensor("vis", np.stack(views)), tensor("ir", thermal)),
        (files("vis", *map(file_of, views)), files("ir", *(file_of(one[..., 0]) for one in thermal))),
        (files("vis", *map(file_of, views)), tensor("ir", thermal)),
    ):
        server.engine.batches.clear()
        found = outputs_of(await post(server.client, *inputs, parameters={"binary_data_output": True, "seed": 4}))
        np.testing.assert_array_equal(found["fused"], np.stack(views))
        np.testing.assert_array_equal(found["ir_restored"], thermal)
        assert [seed for batch in server.engine.batches for seed in batch] == [4] * 5


async def test_a_batch_shares_a_forward_pass(serving: Serving) -> None:
    engine = FakeEngine(batch_sizes=(1, 2, 4))
    engine.gate.clear()
    async with serving(engine, batch={"max_batch": 4, "max_wait_s": 10}) as server:
        first = asyncio.create_task(server.client.post("/v1/fuse", files={"vis": VIS_FILE, "ir": IR_FILE}))
        assert await asyncio.to_thread(engine.started.wait, 10)
        vis, ir = np.stack([VIS] * 4), np.stack([IR] * 4)[..., None]
        batch = asyncio.create_task(post(server.client, tensor("vis", vis), tensor("ir", ir), **ALL_BINARY))
        async with asyncio.timeout(20):
            while True:  # what is held is known to be coming, and the batch waits for it
                if "recofuse_jobs_held 5.0" in (await server.client.get("/metrics")).text:
                    break
                await asyncio.sleep(0.01)
        engine.gate.set()
        assert (await first).status_code == 200
        assert outputs_of(await batch)["fused"].shape == (4, 48, 64, 3)
        assert list(map(len, engine.batches)) == [1, 4]


async def test_sixteen_bit_infrared_is_stretched_as_a_file_is(server: Server) -> None:
    deep = (picture(channels=1, seed=5).astype(np.uint16) * 20 + 7000).astype(np.uint16)
    found = outputs_of(await post(server.client, tensor("vis", VIS), tensor("ir", deep), **ALL_BINARY))
    form = {"vis": VIS_FILE, "ir": file_of(deep)}
    answer = await server.client.post("/v1/fuse", files=form, data={"output": "ir", "format": "npy"})
    np.testing.assert_array_equal(found["ir_restored"][..., 0], np.load(io.BytesIO(answer.content)))


async def test_both_faces_say_what_was_read_of_the_infrared_files(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, odd = (file_of(picture(channels=1, seed=seed)) for seed in (7, 8))
    TellingCodec.serve(monkeypatch, {raw: ("raw", ()), odd: ("palette", ("ir: 暖かい", "second"))})
    expected: list[tuple[tuple[bytes, ...], dict[str, str]]] = [
        ((IR_FILE,), {"infrared_source": "grey"}),
        ((odd,), {"infrared_source": "palette", "warnings": "ir: 暖かい\nsecond"}),
        (
            (raw, IR_FILE, odd),
            {"infrared_source": "raw,grey,palette", "warnings": "pair 2: ir: 暖かい\npair 2: second"},
        ),
    ]
    async with (
        serving(grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for ir, told in expected:
            inputs = (files("vis", *[VIS_FILE] * len(ir)), files("ir", *ir))
            answer = await post(server.client, *inputs, **ALL_BINARY)
            assert json.loads(answer.content[: int(answer.headers[LENGTH])])["parameters"] == told
            message = await stub.ModelInfer(grpc_message(*inputs))
            assert {name: value.string_param for name, value in message.parameters.items()} == told


# refusals

SMALL = np.zeros((8, 8, 3), np.uint8)
OTHER_ASPECT = np.zeros((64, 64, 1), np.uint8)
REFUSED: dict[str, tuple[tuple[tuple[Entry, bytes], ...], dict[str, Any], ErrorCode, str]] = {
    "no ir": ((PIXELS[0],), {}, ErrorCode.INVALID_INPUT, "ir is missing"),
    "vis twice": ((PIXELS[0], *PIXELS), {}, ErrorCode.INVALID_INPUT, "more than once"),
    "unknown input": ((*PIXELS, tensor("depth", VIS)), {}, ErrorCode.INVALID_INPUT, "no input 'depth'"),
    "floats": ((tensor("vis", VIS.astype(np.float32)), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "FLOAT32"),
    "deep vis": ((tensor("vis", VIS.astype(np.uint16)), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "UINT16"),
    "channels first": ((tensor("vis", VIS.transpose(2, 0, 1)), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "[3, 48, 64]"),
    "colour ir": ((PIXELS[0], tensor("ir", VIS)), {}, ErrorCode.INVALID_INPUT, "[height, width, 1]"),
    "no pairs": ((tensor("vis", VIS[None][:0]), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "empty"),
    "unequal": ((tensor("vis", np.stack([VIS, VIS])), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "2 images and ir 1"),
    "too small": ((tensor("vis", SMALL), tensor("ir", SMALL[..., :1])), {}, ErrorCode.INVALID_INPUT, "8x8"),
    "other aspect": ((PIXELS[0], tensor("ir", OTHER_ASPECT)), {}, ErrorCode.INVALID_INPUT, "aspect"),
    "too many": (
        (files("vis", *[b""] * 17), files("ir", *[b""] * 17)), {}, ErrorCode.PAYLOAD_TOO_LARGE, "at most 16",
    ),
    "no image": ((files("vis", b"text"), FILES[1]), {}, ErrorCode.UNSUPPORTED_MEDIA, "vis"),
    "one bad of two": (
        (files("vis", VIS_FILE, b"text"), files("ir", IR_FILE, IR_FILE)),
        ALL_BINARY,
        ErrorCode.UNSUPPORTED_MEDIA,
        "pair 1: vis",
    ),
    "sizes differ": (
        (files("vis", VIS_FILE, pair(96, 72)[0]), files("ir", IR_FILE, IR_FILE)),
        ALL_BINARY,
        ErrorCode.INVALID_INPUT,
        "64x48 and 96x72",
    ),
    "unknown output": (PIXELS, {"outputs": [{"name": "depth"}]}, ErrorCode.INVALID_INPUT, "vis_restored"),
    "output twice": (PIXELS, {"outputs": [{"name": "fused"}] * 2}, ErrorCode.INVALID_INPUT, "more than once"),
    "classification": (
        PIXELS,
        {"outputs": [{"name": "fused", "parameters": {"classification": 3}}]},
        ErrorCode.INVALID_INPUT,
        "classification",
    ),
    "unknown parameter": (PIXELS, {"parameters": {"stepz": 3}}, ErrorCode.INVALID_INPUT, "stepz"),
    "no steps": (PIXELS, {"parameters": {"steps": 0}}, ErrorCode.INVALID_INPUT, "steps"),
    "unknown sampler": (PIXELS, {"parameters": {"sampler": "magic"}}, ErrorCode.INVALID_INPUT, "sampler"),
    "unknown format": (PIXELS, {"parameters": {"format": "bmp"}}, ErrorCode.INVALID_INPUT, "format"),
    "unknown exposure": (PIXELS, {"parameters": {"exposure": "bright"}}, ErrorCode.INVALID_INPUT, "exposure"),
    "exposure of a number": (PIXELS, {"parameters": {"exposure": 1}}, ErrorCode.INVALID_INPUT, "exposure"),
    "bad vis range": (PIXELS, {"parameters": {"vis_range": "9,1"}}, ErrorCode.INVALID_INPUT, "vis_range"),
    "bad range": (PIXELS, {"parameters": {"ir_range": "9,1"}}, ErrorCode.INVALID_INPUT, "ir_range"),
    "unknown priority": (PIXELS, {"parameters": {"priority": 4}}, ErrorCode.INVALID_INPUT, "priority"),
    "no time": (PIXELS, {"parameters": {"timeout": 0}}, ErrorCode.INVALID_INPUT, "timeout"),
    "too much time": (PIXELS, {"parameters": {"timeout_ms": 10**9}}, ErrorCode.INVALID_INPUT, "timeout"),
}  # fmt: skip


async def test_what_cannot_be_fused_is_refused_by_both_faces(serving: Serving) -> None:
    async with (
        serving(grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, (inputs, document, code, told) in REFUSED.items():
            if "binary_data_output" not in document.get("parameters", {}):
                document = {**document, "parameters": {**document.get("parameters", {}), "binary_data_output": True}}
            assert told in refusal(await post(server.client, *inputs, **document), code), name
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ModelInfer(grpc_message(*inputs, **document))
            assert refused.value.code().name == STATUS[code][1], name
            assert told in str(refused.value.details()), name
        assert server.engine.batches == []
        outputs_of(await post(server.client, *PIXELS))


async def test_limits_hold_before_anything_is_decoded(serving: Serving) -> None:
    limits = {"max_image_bytes": 20_000, "max_side": 64, "max_pairs": 2, "max_json_bytes": 20_000}
    async with serving(limits=limits) as server:
        large = ErrorCode.PAYLOAD_TOO_LARGE
        outputs_of(await post(server.client, *PIXELS, **ALL_BINARY))
        wide = np.zeros((32, 65, 3), np.uint8)
        refusal(await post(server.client, tensor("vis", wide), tensor("ir", wide[..., :1]), **ALL_BINARY), large)
        thrice = np.zeros((3, 32, 32, 3), np.uint8)
        assert "at most 2" in refusal(
            await post(server.client, tensor("vis", thrice), tensor("ir", thrice[..., :1]), **ALL_BINARY), large
        )
        refusal(await server.client.post(INFER, content=b" " * 20_001), large)
        refusal(await server.client.post(INFER, content=b" " * 200_000), large)
        assert "binary_data" in refusal(await post(server.client, *PIXELS), large)  # 9216 values would be 36 kB of JSON
        refusal(await post(server.client, *FILES), large)
        outputs_of(await post(server.client, *FILES, outputs=[{"name": "ir_restored"}]))


# models, time, keys, numbers


async def test_models_go_by_two_names_and_their_version(server: Server) -> None:
    body, headers = message(*PIXELS, **ALL_BINARY)
    for name in ("recofuse", "fake", "recofuse/versions/7", "fake/versions/7"):
        assert (await server.client.get(f"/v2/models/{name}/ready")).json() == {"ready": True}
        metadata = (await server.client.get(f"/v2/models/{name}")).json()
        assert (metadata["name"], metadata["versions"]) == (name.partition("/")[0], ["7"])
        config = (await server.client.get(f"/v2/models/{name}/config")).json()
        assert config["parameters"]["default_steps"] == {"string_value": "3"}
        outputs_of(await server.client.post(f"/v2/models/{name}/infer", content=body, headers=headers))
    for name in ("other", "recofuse/versions/8", "fake/versions/1", "other/versions/7"):
        for suffix in ("", "/ready", "/config", "/stats"):
            answer = await server.client.get(f"/v2/models/{name}{suffix}")
            assert "there" in refusal(answer, ErrorCode.MODEL_NOT_FOUND)
        answer = await server.client.post(f"/v2/models/{name}/infer", content=body, headers=headers)
        refusal(answer, ErrorCode.MODEL_NOT_FOUND)


async def test_a_model_that_is_not_there_is_not_ready(serving: Serving) -> None:
    """No error over gRPC, where the answer has a place for it; over HTTP the status is the answer."""
    known = [("recofuse", ""), ("fake", ""), ("fake", "7")]
    unknown = [("other", ""), ("", ""), ("fake", "8"), ("recofuse", "x"), ("other", "7"), ("x" * 5000, "")]
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, version in known + unknown:
            answer = await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))
            assert answer.ready == ((name, version) in known)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelMetadata(pb.ModelMetadataRequest(name="other"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_time_that_is_up_is_told(serving: Serving) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with serving(engine, grpc={"port": 0}) as server:
        refusal(await post(server.client, *PIXELS, parameters={"timeout": 100_000}), ErrorCode.TIMED_OUT)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await stub.ModelInfer(grpc_message(*PIXELS), timeout=0.2)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        engine.gate.set()


async def test_keys_open_what_their_scope_says_and_pay_by_pair(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    store = FileKeys(path)
    reader, reading = new_key("reader", scopes=(Scope.READ,))
    maker, making = new_key("maker", scopes=(Scope.FUSE,), rate_per_s=0.001, burst=3)
    await store.put(reader)
    await store.put(maker)
    async with (
        serving(auth={"keys": f"file:{path}"}, grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        client, stub = server.client, inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        body, headers = message(*PIXELS)
        for public in ("/v2", "/v2/health/live", "/v2/health/ready"):
            assert (await client.get(public)).status_code == 200
        refusal(await client.get("/v2/models/recofuse"), ErrorCode.UNAUTHENTICATED)
        refusal(await client.post(INFER, content=body, headers=headers), ErrorCode.UNAUTHENTICATED)
        as_reader, as_maker = {"Authorization": f"Bearer {reading}"}, {"Authorization": f"Bearer {making}"}
        assert (await client.get("/v2/models/recofuse/config", headers=as_reader)).status_code == 200
        forbidden = await client.post(INFER, content=body, headers=headers | as_reader)
        refusal(forbidden, ErrorCode.PERMISSION_DENIED)

        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "recofuse"
        asked = pb.ModelMetadataRequest(name="recofuse")
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await stub.ModelMetadata(asked)
        with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
            await stub.ModelInfer(grpc_message(*PIXELS), metadata=(("authorization", f"Bearer {reading}"),))
        metadata = await stub.ModelMetadata(asked, metadata=(("authorization", f"Bearer {reading}"),))
        assert list(metadata.versions) == ["7"]

        two = message(tensor("vis", np.stack([VIS, VIS])), tensor("ir", np.stack([IR, IR])[..., None]), **ALL_BINARY)
        assert (await client.post(INFER, content=two[0], headers=two[1] | as_maker)).status_code == 200
        refusal(await client.post(INFER, content=two[0], headers=two[1] | as_maker), ErrorCode.RATE_LIMITED)
        assert server.engine.batches.count([0]) + 2 * server.engine.batches.count([0, 0]) == 2


async def test_metrics_and_statistics_count(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        two = (tensor("vis", np.stack([VIS, VIS])), tensor("ir", np.stack([IR, IR])[..., None]))
        body, headers = message(*two, **ALL_BINARY)
        answer = await server.client.post(INFER, content=body, headers=headers | {"X-Request-ID": "a.b"})
        assert answer.headers["x-request-id"] == "a.b"
        outputs_of(answer)
        refusal(await post(server.client, PIXELS[0]), ErrorCode.INVALID_INPUT)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            sent = grpc_message(*PIXELS, id="mine", outputs=[{"name": "fused"}])
            found = await stub.ModelInfer(sent)
            assert (found.id, found.model_name, len(found.raw_output_contents)) == ("mine", "fake", 1)
            assert found.raw_output_contents[0] == VIS.tobytes()
            told = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="recofuse"))
        (over_http,) = (await server.client.get("/v2/models/stats")).json()["model_stats"]
        statistics = over_http["inference_stats"]
        counts = [statistics[name]["count"] for name in ("success", "fail", "queue", "compute_infer", "cache_hit")]
        assert counts == [2, 1, 2, 2, 0]
        assert over_http["inference_count"] == told.model_stats[0].inference_count == 3
        assert 2 <= over_http["execution_count"] <= 3
        assert statistics["success"]["ns"] > statistics["compute_infer"]["ns"] > 0
        assert told.model_stats[0].inference_stats.success.ns == statistics["success"]["ns"]
        text = (await server.client.get("/metrics")).text
        route = "/v2/models/{model_name}/infer"
        for line in (
            f'recofuse_requests_total{{method="POST",protocol="http",route="{route}",status="200"}} 1.0',
            f'recofuse_requests_total{{method="POST",protocol="http",route="{route}",status="422"}} 1.0',
            'recofuse_requests_total{method="unary",protocol="grpc",'
            'route="/inference.GRPCInferenceService/ModelInfer",status="OK"} 1.0',
            'recofuse_errors_total{code="invalid_input"} 1.0',
        ):
            assert line in text, line

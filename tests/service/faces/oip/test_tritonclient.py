"""NVIDIA's client, unchanged, meets a server process of its own with the shipped model."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from benchmarks.processes import Stack, all_in_one, free_port
from tests.service.faces.oip.messages import IR, IR_FILE, VIS, VIS_FILE

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("first", ["recofuse_protos.inference.v2.inference_pb2", "tritonclient.grpc.service_pb2"])
def test_one_process_holds_our_messages_and_theirs(first: str) -> None:
    """Both define the package `inference`; protobuf's default pool would refuse the second."""
    code = f"""
import {first}
import service.faces.grpc.server
from recofuse_protos.inference.v2 import inference_pb2 as ours
from tritonclient.grpc import service_pb2 as theirs
for name, message in ours.DESCRIPTOR.message_types_by_name.items():
    theirs_too = theirs.DESCRIPTOR.pool.FindMessageTypeByName(f"inference.{{name}}")
    for field in message.fields:
        other = theirs_too.fields_by_name[field.name]
        shown, wanted = ((one.number, one.type, one.is_repeated) for one in (field, other))
        assert shown == wanted, field.name
sent = ours.ModelInferRequest(model_name="a", raw_input_contents=[b"b"])
assert theirs.ModelInferRequest.FromString(sent.SerializeToString()).raw_input_contents == [b"b"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def stack(grpc_port: int) -> Iterator[Stack]:
    """A server process with the shipped model."""
    engine = {"kind": "core", "device": "cpu", "num_threads": 1, "warm_up_sizes": "64x48"}
    with all_in_one({"engine": engine, "grpc": {"port": grpc_port}, "log": {"level": "ERROR"}}) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, stack: Stack, grpc_port: int) -> Iterator[tuple[Any, Any]]:
    """The client's module and a client."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    address = f"127.0.0.1:{grpc_port}" if request.param == "grpc" else f"127.0.0.1:{stack.address[1]}"
    with module.InferenceServerClient(address) as client:
        yield module, client


def triton_inputs(module: Any, vis: NDArray[Any], ir: NDArray[Any]) -> list[Any]:
    inputs = []
    for name, array in (("vis", vis), ("ir", ir)):
        datatype = "BYTES" if array.dtype == np.object_ else array.dtype.name.upper()
        inputs.append(module.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def fused_by_v1(stack: Stack, vis: bytes, ir: bytes, **options: str) -> dict[str, bytes]:
    """The three files of /v1/fuse."""
    url = f"http://127.0.0.1:{stack.address[1]}/v1/fuse"
    answer = httpx.post(url, files={"vis": vis, "ir": ir}, data={"output": "all", **options}, timeout=60)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return {name.partition(".")[0]: archive.read(name) for name in archive.namelist()}


def test_tritonclient_finds_its_way(triton: tuple[Any, Any]) -> None:
    module, client = triton
    more = {"as_json": True} if module is tritonclient.grpc else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("recofuse")
    assert client.is_model_ready("compact")
    assert client.get_server_metadata(**more)["name"] == "recofuse"
    metadata = client.get_model_metadata("compact", **more)
    assert [one["name"] for one in metadata["inputs"]] == ["vis", "ir"]
    assert [one["name"] for one in metadata["outputs"]] == ["fused", "vis_restored", "ir_restored", "values"]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, -1, -1, 3]
    (version,) = metadata["versions"]
    assert client.is_model_ready("compact", version)
    assert client.is_model_ready("other") is False
    assert client.is_model_ready("compact", "0.0.1") is False
    config = client.get_model_config("recofuse", version, **more)
    config = config.get("config", config)
    assert config["max_batch_size"] == 16
    assert [one["data_type"] for one in config["input"]] == ["TYPE_UINT8", "TYPE_UINT8"]
    (statistics,) = client.get_inference_statistics("recofuse", **more)["model_stats"]
    assert statistics["version"] == version
    with pytest.raises(InferenceServerException, match="there is no model 'other'"):
        client.get_model_metadata("other")


@pytest.mark.parametrize("kind", ["pixels", "files"])
def test_tritonclient_gets_the_pixels_of_v1(triton: tuple[Any, Any], stack: Stack, kind: str) -> None:
    module, client = triton
    expected = {
        name: np.load(io.BytesIO(content))
        for name, content in fused_by_v1(stack, VIS_FILE, IR_FILE, format="npy", seed="5").items()
        if name != "result"
    }
    if kind == "pixels":
        inputs = triton_inputs(module, VIS, IR[..., None])
    else:
        inputs = triton_inputs(module, *(np.array([content], np.object_) for content in (VIS_FILE, IR_FILE)))
    answer = client.infer("recofuse", inputs, request_id="7", priority=1, timeout=60_000_000, parameters={"seed": 5})
    fused = answer.as_numpy("fused").reshape(VIS.shape)
    assert fused.std() > 0
    np.testing.assert_array_equal(fused, expected["fused"])
    np.testing.assert_array_equal(answer.as_numpy("vis_restored").reshape(VIS.shape), expected["vis"])
    np.testing.assert_array_equal(answer.as_numpy("ir_restored").reshape(IR.shape), expected["ir"])


def test_tritonclient_gets_the_files_of_v1(triton: tuple[Any, Any], stack: Stack) -> None:
    module, client = triton
    expected = fused_by_v1(stack, VIS_FILE, IR_FILE, format="png", seed="5")
    inputs = triton_inputs(module, *(np.array([content], np.object_) for content in (VIS_FILE, IR_FILE)))
    wanted = [module.InferRequestedOutput("fused")]
    answer = client.infer("compact", inputs, outputs=wanted, parameters={"seed": 5, "format": "png"})
    assert list(answer.as_numpy("fused")) == [expected["fused"]]
    assert answer.as_numpy("ir_restored") is None


def test_tritonclient_hears_what_was_wrong(triton: tuple[Any, Any]) -> None:
    module, client = triton
    with pytest.raises(InferenceServerException, match="accepted are") as refused:
        client.infer("recofuse", triton_inputs(module, VIS, VIS))
    expected = {tritonclient.http: "422", tritonclient.grpc: "StatusCode.INVALID_ARGUMENT"}[module]
    assert refused.value.status() == expected

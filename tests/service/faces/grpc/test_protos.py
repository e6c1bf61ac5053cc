"""The generated code is what proto/ says, and none of its methods is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.faces.grpc.fusion import FusionServicer
from service.faces.oip.grpc import InferenceServicer

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("ours", "generated"),
    [
        (FusionServicer, fusion_pb2_grpc.FusionServiceServicer),
        (InferenceServicer, inference_pb2_grpc.GRPCInferenceServiceServicer),
    ],
)
def test_no_method_is_left_to_the_generated_refusal(ours: type, generated: type) -> None:
    methods = {name for name in vars(generated) if not name.startswith("_")}
    assert "Fuse" in methods or "ModelInfer" in methods
    assert methods <= set(vars(ours))


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "proto" / "generate.py"), str(tmp_path)], check=True)
    fresh = {path.relative_to(tmp_path): path.read_text("utf-8") for path in tmp_path.rglob("*.py*")}
    folder = ROOT / "recofuse_protos"
    kept = {path.relative_to(folder) for path in folder.rglob("*.py*") if "__pycache__" not in path.parts}
    assert set(fresh) == kept
    for path, text in fresh.items():
        assert (folder / path).read_text("utf-8") == text, f"{path} differs; run make proto"

"""Two processes that train one model."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.core.training.small import ROOT

TOGETHER = """
import sys
from pathlib import Path
import torch
from recofuse_core.sampler import Pair, Prediction
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training.config import DataConfig, StageConfig, TrainConfig
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.trainer import Trainer

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
levels = lambda image: (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
scene = make_scene(1, 64, 80)
data = DataConfig(root="scenes")
stage = StageConfig("coupled", 2, 2, 32, 1e-3, rollout=True)
source = PairSource(data, [("a", levels(scene.vis), levels(scene.ir)[..., 0])])
run = Trainer(TrainConfig("compact", "0", data, (stage,), ema_interval=1), source)
losses = [report.losses["vis"] for report in run.run_stage()]
run.save(Path(sys.argv[1]) / "state.pt")
torch.save({"losses": losses, "weights": run.model.state_dict()}, Path(sys.argv[1]) / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_processes_that_train_together_keep_equal_weights_from_different_batches(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "together.py"), str(tmp_path)], check=True, env=environment, cwd=ROOT)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["losses"] != second["losses"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["generators"]) == 2
    assert not torch.equal(*state["generators"])

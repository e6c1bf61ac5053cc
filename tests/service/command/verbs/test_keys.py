"""The verbs of `recofuse keys`, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from service.access.keys import FileKeys, is_secret_of

ROOT = Path(__file__).parents[4]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RECOFUSE_")}
    command = [sys.executable, "-m", "service", "keys", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=clean, timeout=60)


async def test_keys_are_created_listed_and_revoked_by_command(tmp_path: Path) -> None:
    store = f"file:{tmp_path / 'keys.json'}"
    made = run("create", "camera 1", "--scope", "fuse", "--rate", "5", "--days", "1", "--store", store)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    record = await FileKeys(tmp_path / "keys.json").get(key.split("_")[1])
    assert record is not None
    assert is_secret_of(record, key.split("_", 2)[2])
    (line,) = run("list", "--json", "--store", store).stdout.splitlines()
    listed = json.loads(line)
    assert (listed["id"], listed["name"], listed["scopes"], listed["state"]) == (record.id, "camera 1", "fuse", "valid")
    assert run("revoke", record.id, "--store", store).stdout.split() == [record.id]
    assert '"revoked"' in run("list", "--json", "--store", store).stdout
    for wrong in (("revoke", "0" * 12), ("create", "a", "--scope", "all"), ("list", "--store", "file:")):
        failed = run(*wrong, *(() if "--store" in wrong else ("--store", store)))
        assert failed.returncode == 2
        assert "Traceback" not in failed.stderr

"""What a host lacks for kernels of our own is said in words, before anything is compiled."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from recofuse_core.kernels.needs import Host, look, told, unfit

READY = Host("3.7.1", "/usr/bin/gcc", Path("/tmp/cache"), ())


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that Triton needs of a host, which is told to look nowhere else."""
    pytest.importorskip("triton", reason="Triton is not installed: there is no wheel of it for this platform")
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there"))
    mount(monkeypatch, flags=0)
    return tmp_path


def mount(monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """Let folders be on a file system that is mounted so, wherever those of tests are."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))


def test_a_host_that_has_all(host: Path) -> None:
    found = look(include=host)
    assert found.lacks == ()
    assert found.compiler == str(host / "gcc")
    assert found.cache == host / "not" / "there"
    assert found.triton


def test_a_host_without_a_compiler(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "icc")
    assert look(include=host).lacks == ("there is no C compiler (icc)",)
    monkeypatch.delenv("CC")
    (host / "gcc").unlink()
    assert look(include=host).lacks == ("there is no C compiler (gcc or clang)",)


def test_a_host_without_headers(host: Path) -> None:
    (host / "Python.h").unlink()
    (lack,) = look(include=host).lacks
    assert lack.startswith("Python's headers are not installed")


def test_a_cache_that_cannot_be_written(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(host / "gcc" / "cache"))
    (lack,) = look(include=host).lacks
    assert "cannot be written" in lack


def test_a_cache_that_cannot_be_executed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Docker mounts a tmpfs unless told otherwise."""
    mount(monkeypatch, flags=os.ST_NOSUID)
    assert unfit(tmp_path) == ""
    mount(monkeypatch, flags=os.ST_NOSUID | os.ST_NOEXEC)
    assert "nothing can be executed" in unfit(tmp_path)


@pytest.mark.parametrize(
    ("choice", "host", "on_gpu", "use"),
    [
        ("eager", READY, True, "none, as asked"),
        ("auto", READY, False, "none: they are for a GPU"),
        ("auto", Host("", "", None, ("Triton is not installed",)), True, "none: Triton is not installed"),
        ("triton", READY, True, "all, untried"),
        ("auto", READY, True, "those that a trial at the start finds"),
    ],
    ids=["eager", "cpu", "no triton", "triton", "auto"],
)
def test_what_would_be_used(choice: str, host: Host, on_gpu: bool, use: str) -> None:
    said = told(choice, host, on_gpu=on_gpu)  # type: ignore[arg-type]
    assert said["used"].startswith(use)
    assert said["asked"] == choice
    assert ("compiler" in said) == bool(host.triton)

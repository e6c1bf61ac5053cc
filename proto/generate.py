"""Generates the Python messages and stubs of the public contract: `python proto/generate.py [FOLDER]`.

protoc names the modules after the folders of proto/, as if they lay at the top level. Here they live below
recofuse_protos, so their imports of each other are rewritten. The descriptors keep their public names
(recofuse/v1/fusion.proto), so that other code generated from the same files can share a process with this one.

The Open Inference Protocol's messages are also shipped by its clients (tritonclient, kserve), under file names of their
own, and protobuf's default pool refuses a message that comes twice. Ours go into a pool of their own.

gRPC's plugin gives every method of a servicer a body that answers UNIMPLEMENTED, for servers that leave it out. Ours
leaves none out, which tests/service/faces/grpc holds; a note at the top of those modules says so.
"""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

SOURCE = Path(__file__).parent
TARGET = SOURCE.parent / "recofuse_protos"
PACKAGE = "recofuse_protos"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
IMPORT = re.compile(r"^(from|import) (recofuse|inference)\.", re.MULTILINE)
FOREIGN = ("inference",)  # folders of messages that others define as well
DEFAULT_POOL = "_descriptor_pool.Default()"
OWN_POOL = "_descriptor_pool.DescriptorPool()"
SERVICER_NOTE = (
    "# The bodies of the servicers below answer for methods that a server leaves out; service/ leaves none out, which\n"
    "# tests/service/faces/grpc holds. Like all of this module they are the plugin's: see proto/generate.py.\n"
)


def generate(target: Path) -> None:
    """Write the modules of every file below proto/ into a folder. Raises RuntimeError with protoc's status."""
    sources = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.proto"))
    plugins = [f"--plugin={name}={Path(sys.executable).parent / name}" for name in PLUGINS]
    kinds = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    includes = [f"-I{SOURCE}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    target.mkdir(parents=True, exist_ok=True)
    if status := protoc.main(["protoc", *includes, *plugins, *kinds, *sources]):
        raise RuntimeError(f"protoc ended with status {status}")
    for path in [*target.rglob("*.py"), *target.rglob("*.pyi")]:
        text = IMPORT.sub(rf"\1 {PACKAGE}.\2.", path.read_text("utf-8"))
        if path.relative_to(target).parts[0] in FOREIGN:
            text = text.replace(DEFAULT_POOL, OWN_POOL)
        if path.name.endswith("_pb2_grpc.py"):
            text = SERVICER_NOTE + text
        path.write_text(text, "utf-8")
    modules = {path.relative_to(target) for path in target.rglob("*_pb2.py")}
    for folder in {target / parent for path in modules for parent in path.parents}:
        (folder / "__init__.py").write_text('"""Generated from proto/ by `make proto`; never edited."""\n', "utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)

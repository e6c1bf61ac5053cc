"""A manifest's container as Kubernetes would run it: options of `podman run` from a Deployment of deploy/kubernetes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.compose import ROOT
from tests.image.podman import limits

KUBERNETES = ROOT / "deploy" / "kubernetes"
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


def container_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod and its container of base/NAME.yaml."""
    documents = yaml.safe_load_all((KUBERNETES / "base" / f"{name}.yaml").read_text("utf-8"))
    (deployment,) = [entry for entry in documents if entry["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def memory_bytes(container: dict[str, Any]) -> int:
    """The limit of a container's memory."""
    match = re.fullmatch(r"(\d+)(Mi|Gi)", container["resources"]["limits"]["memory"])
    assert match is not None
    return int(match[1]) * UNITS[match[2]]


def flags(name: str, folder: Path, queue_url: str, settings: dict[str, str]) -> list[str]:
    """Options for the container of base/NAME.yaml. folder: for its volumes; queue_url: what its Secret says.

    settings: beside those of its ConfigMap.
    """
    pod, container = container_of(name)
    user, rights = pod["securityContext"], container["securityContext"]
    assert rights.keys() == {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}
    words = [
        f"--user={user['runAsUser']}:{user['runAsGroup']}",
        f"--stop-timeout={pod['terminationGracePeriodSeconds']}",
        f"--memory={memory_bytes(container)}",
        *limits({}),
        *(f"--cap-drop={capability}" for capability in rights["capabilities"]["drop"]),
        *([] if rights["allowPrivilegeEscalation"] else ["--security-opt=no-new-privileges"]),
        *(["--read-only", "--read-only-tmpfs=false"] if rights["readOnlyRootFilesystem"] else []),
        *(f"--env={literal}" for literal in _settings()),
        *(f"--env={setting}={value}" for setting, value in settings.items()),
    ]
    sources = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in container["volumeMounts"]:
        source = folder / mount["name"]
        source.mkdir(parents=True)
        if "secret" in sources[mount["name"]]:
            (source / "url").write_text(queue_url, "utf-8")
        else:
            source.chmod(0o777)  # an emptyDir
        words.append(f"--volume={source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}")
    return words


def _settings() -> list[str]:
    """NAME=VALUE of the ConfigMap, as the overlay for CPUs leaves it."""
    found = []
    for file in ("base", "overlays/cpu"):
        document = yaml.safe_load((KUBERNETES / file / "kustomization.yaml").read_text("utf-8"))
        for made in document["configMapGenerator"]:
            if made["name"] == "recofuse-settings":
                found += made["literals"]
    return found

"""What KEDA admits, and what its scalers read, by version: the rules that touch our manifests, from KEDA's own sources.

Where each was read (repository kedacore/keda):

- `apis/keda/v1alpha1/scaledobject_webhook.go` and `scaledobject_types.go`: `validateWorkload`, `CheckFallbackValid`,
  `CheckReplicaCountBoundsAreValid`, `verifyHpas`, `verifyScaledObjects`, `verifyName`; `scaletriggers_types.go`:
  `ValidateTriggers`. The check of `fallback` came with 2.14 (pull request 5629), asked for every `metricType` in words
  until 2.16 (issue 6066), for one of them in 2.17.0 (issue 6696), takes a missing one for AverageValue since 2.17.1
  (pull request 6702), and admits Value since 2.18 (pull request 6655).
- `pkg/scalers/redis_streams_scaler.go` and `redis_scaler.go`: without `consumerGroup` a stream is measured by XLEN,
  since 2.11 (issue 4277); a `ca` of one's own is read since 2.12 (issue 4917). An `address` or `addresses` may come
  from the TriggerAuthentication; `tls` there and `enableTLS` here exclude each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Manifest = dict[str, Any]
Version = tuple[int, int, int]

LOWEST: Version = (2, 12, 0)
VERSIONS: tuple[Version, ...] = (
    *((2, 12, 0), (2, 12, 1), (2, 13, 0), (2, 13, 1), (2, 14, 0), (2, 14, 1), (2, 15, 0), (2, 15, 1), (2, 16, 0)),
    *((2, 16, 1), (2, 17, 0), (2, 17, 1), (2, 17, 2), (2, 18, 0), (2, 19, 0), (2, 20, 0)),
)
_RESOURCES = ("cpu", "memory")  # scalers of the autoscaler itself
_STREAMS = ("redis-streams", "redis-cluster-streams", "redis-sentinel-streams")


def refusals(documents: list[Manifest], version: Version) -> list[str]:
    """Why KEDA of this version would not admit these manifests, or could make no scaler of them; empty: it does."""
    scaled = [each for each in documents if each["kind"] == "ScaledObject"]
    found: list[str] = []
    for document in scaled:
        found += _bounds(document["spec"])
        found += _names(document)
        found += _triggers(document["spec"]["triggers"])
        found += _fallback(document["spec"], version)
        found += _other_owners(document, scaled, documents)
        for trigger in document["spec"]["triggers"]:
            found += _scaler(trigger, documents, version)
    return found


def measured_by_length(trigger: Manifest) -> bool:
    """Whether the trigger looks at a stream's length, as its scaler decides it."""
    return trigger["type"] in _STREAMS and not trigger["metadata"].get("consumerGroup")


def _bounds(spec: Manifest) -> Iterator[str]:
    least, most = spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
    if least > most:
        yield "minReplicaCount is above maxReplicaCount"
    if "idleReplicaCount" in spec and spec["idleReplicaCount"] >= least:
        yield "idleReplicaCount is not below minReplicaCount"


def _names(document: Manifest) -> Iterator[str]:
    if len(f"keda-hpa-{document['metadata']['name']}") > 63:
        yield "the autoscaler's name is too long"


def _triggers(triggers: list[Manifest]) -> Iterator[str]:
    if not triggers:
        yield "no triggers are defined"
    names = [trigger["name"] for trigger in triggers if trigger.get("name")]
    if len(set(names)) < len(names):
        yield "the name of a trigger is there twice"
    if any(trigger.get("useCachedMetrics") and trigger["type"] in (*_RESOURCES, "cron") for trigger in triggers):
        yield "useCachedMetrics is not supported"


def _fallback(spec: Manifest, version: Version) -> Iterator[str]:
    if "fallback" not in spec or version < (2, 14, 0):
        return
    if spec["fallback"]["failureThreshold"] < 0 or spec["fallback"]["replicas"] < 0:
        yield "failureThreshold and replicas must not be negative"
    if version < (2, 17, 0):
        for trigger in spec["triggers"]:
            if trigger["type"] in _RESOURCES:
                yield "fallback is not supported by the cpu and memory scalers"
            elif trigger.get("metricType", "") != "AverageValue":
                yield f"MetricType={trigger.get('metricType', '')}, but fallback needs AverageValue"
        return
    kinds = [trigger.get("metricType", "") for trigger in spec["triggers"] if trigger["type"] not in _RESOURCES]
    if version >= (2, 17, 1):
        kinds = [kind or "AverageValue" for kind in kinds]
    admitted = {"AverageValue", "Value"} if version >= (2, 18, 0) else {"AverageValue"}
    if not admitted & set(kinds):
        yield "at least one trigger has to have the AverageValue type for the fallback to be enabled"


def _other_owners(document: Manifest, scaled: list[Manifest], documents: list[Manifest]) -> Iterator[str]:
    target = document["spec"]["scaleTargetRef"]["name"]
    for other in scaled:
        if other is not document and other["spec"]["scaleTargetRef"]["name"] == target:
            yield f"{target} is already managed by the ScaledObject {other['metadata']['name']}"
    for other in documents:
        if other["kind"] == "HorizontalPodAutoscaler" and other["spec"]["scaleTargetRef"]["name"] == target:
            yield f"{target} is already managed by the autoscaler {other['metadata']['name']}"


def _scaler(trigger: Manifest, documents: list[Manifest], version: Version) -> Iterator[str]:
    metadata = trigger["metadata"]
    parameters: set[str] = set()
    if (reference := trigger.get("authenticationRef")) is not None:
        found = [each for each in documents if each["kind"] == "TriggerAuthentication"]
        named = [each for each in found if each["metadata"]["name"] == reference["name"]]
        if len(named) != 1:
            yield f"there is no TriggerAuthentication {reference['name']}"
        parameters = {each["parameter"] for document in named for each in document["spec"]["secretTargetRef"]}
    if trigger["type"] == "prometheus":
        for name in ("serverAddress", "query", "threshold"):
            if not metadata.get(name):
                yield f"prometheus: {name} is missing"
        return
    if trigger["type"] not in _STREAMS:
        yield f"no scaler is called {trigger['type']}"
        return
    if not metadata.get("stream"):
        yield "missing redis stream name"
    if not metadata.get("consumerGroup") and version < (2, 11, 0):
        yield "the length of a stream is not known yet"
    several = trigger["type"] != "redis-streams"
    if not {"addresses" if several else "address"} & (parameters | set(metadata)):
        yield "no address given"
    if trigger["type"] == "redis-sentinel-streams" and "sentinelMaster" not in parameters | set(metadata):
        yield "no sentinelMaster given"
    if "tls" in parameters and "enableTLS" in metadata:
        yield "unable to set tls in both ScaledObject and TriggerAuthentication together"
    if "ca" in parameters and version < (2, 12, 0):
        yield "ca is not read yet"
    for name in ("streamLength", "lagCount", "pendingEntriesCount", "databaseIndex"):
        if name in metadata and not metadata[name].isdigit():
            yield f"error parsing {name}"

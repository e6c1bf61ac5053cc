"""Every manifest against its schema: Kubernetes' own, or, for custom resources, the part of it that is used here."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import kubernetes_validate

Manifest = dict[str, Any]
VERSION = "1.31"  # of Kubernetes


def _object(required: tuple[str, ...] = (), **properties: object) -> Manifest:
    """An object that has these properties and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def _list(items: Manifest) -> Manifest:
    return {"type": "array", "minItems": 1, "items": items}


_TEXT: Manifest = {"type": "string", "minLength": 1}
_COUNT: Manifest = {"type": "integer", "minimum": 0}
_PORT: Manifest = {"type": "integer", "minimum": 1, "maximum": 65535}
_NAME = _object(("name",), name=_TEXT)
_NUMBER: Manifest = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}  # KEDA's metadata are strings, whatever they mean
_STREAM = _object(
    ("type", "metricType", "metadata", "authenticationRef"),
    type={"enum": ["redis-streams", "redis-sentinel-streams"]},
    metricType={"const": "AverageValue"},
    metadata=_object(("stream", "streamLength"), stream=_TEXT, streamLength=_NUMBER, enableTLS={"const": "true"}),
    authenticationRef=_NAME,
)
_PROMETHEUS = _object(
    ("type", "metricType", "metadata"),
    type={"const": "prometheus"},
    metricType={"enum": ["Value", "AverageValue"]},
    metadata=_object(
        ("serverAddress", "query", "threshold"),
        **dict.fromkeys(("serverAddress", "query"), _TEXT),
        **dict.fromkeys(("threshold", "activationThreshold"), _NUMBER),
    ),
)
_PARENTS = _list(_object(("name",), **dict.fromkeys(("name", "namespace", "sectionName"), _TEXT)))
_BACKENDS = _list(_object(("name", "port"), name=_TEXT, port=_PORT))


def _route(**rule: object) -> Manifest:
    """A route of the Gateway API whose rules may have this beside what both kinds have."""
    rules = _list(_object(("matches", "backendRefs"), backendRefs=_BACKENDS, **rule))
    return _object(("parentRefs", "hostnames", "rules"), parentRefs=_PARENTS, hostnames=_list(_TEXT), rules=rules)


_PATH = _object(("type", "value"), type={"enum": ["Exact", "PathPrefix"]}, value={"type": "string", "pattern": "^/"})
_DURATION: Manifest = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
CUSTOM: dict[str, tuple[str, Manifest]] = {  # version and spec by kind
    "ScaledObject": (
        "keda.sh/v1alpha1",
        _object(
            ("scaleTargetRef", "triggers"),
            scaleTargetRef=_NAME,
            **dict.fromkeys(("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"), _COUNT),
            fallback=_object(("failureThreshold", "replicas"), failureThreshold=_COUNT, replicas=_COUNT),
            triggers=_list({"oneOf": [_STREAM, _PROMETHEUS]}),
        ),
    ),
    "TriggerAuthentication": (
        "keda.sh/v1alpha1",
        _object(
            secretTargetRef=_list(
                _object(("parameter", "name", "key"), **dict.fromkeys(("parameter", "name", "key"), _TEXT))
            )
        ),
    ),
    "ServiceMonitor": (
        "monitoring.coreos.com/v1",
        _object(
            ("selector", "endpoints"),
            jobLabel=_TEXT,
            selector=_object(("matchLabels",), matchLabels={"type": "object", "additionalProperties": _TEXT}),
            endpoints=_list(_object(("port",), **dict.fromkeys(("port", "path", "interval"), _TEXT))),
        ),
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        _object(
            ("groups",),
            groups=_list(_object(("name", "rules"), name=_TEXT, interval=_DURATION, rules=_list({"type": "object"}))),
        ),
    ),
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        _route(matches=_list(_object(("path",), path=_PATH)), timeouts=_object(("request",), request=_DURATION)),
    ),
    "GRPCRoute": (
        "gateway.networking.k8s.io/v1",
        _route(matches=_list(_object(("method",), method=_object(("service",), service=_TEXT, method=_TEXT)))),
    ),
}


def check(document: Manifest) -> None:
    """Raises a ValidationError, of jsonschema or of kubernetes_validate, unless the manifest follows its schema."""
    _check(json.dumps(document, sort_keys=True))


@functools.cache  # the same manifest stands in hundreds of combinations
def _check(text: str) -> None:
    document = json.loads(text)
    if document["kind"] not in CUSTOM:
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    version, shape = CUSTOM[document["kind"]]
    assert document["apiVersion"] == version
    jsonschema.validate(document["spec"], shape)

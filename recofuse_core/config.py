"""Config dataclasses from JSON or TOML values, each value checked against its annotation."""

import types
import typing
from collections.abc import Mapping
from typing import Any

from recofuse_core.detail import DetailConfig
from recofuse_core.errors import ConfigError
from recofuse_core.exposure import ExposureConfig
from recofuse_core.model import ModelConfig
from recofuse_core.networks import (
    DenoiserConfig,
    FusionConfig,
    GatedAutoencoderConfig,
    PaperAutoencoderConfig,
    ToneConfig,
)
from recofuse_core.sde import SDEConfig
from recofuse_core.veil import VeilConfig
from recofuse_core.weather import WeatherConfig

AUTOENCODERS: dict[str, type] = {"paper": PaperAutoencoderConfig, "gated": GatedAutoencoderConfig}


def model_config_from(values: Any) -> ModelConfig:
    """The config that `dataclasses.asdict` wrote. Raises ConfigError, TypeError or KeyError for anything else."""
    values = dict(values)
    kind = values["autoencoder"]["kind"]
    if kind not in AUTOENCODERS:
        raise ConfigError(f"unknown kind of autoencoder {kind!r}; known: {', '.join(AUTOENCODERS)}")
    sections: dict[str, type] = {
        "autoencoder": AUTOENCODERS[kind],
        "denoiser": DenoiserConfig,
        "fusion": FusionConfig,
        "sde": SDEConfig,
    }
    optional = {"tone": ToneConfig, "exposure": ExposureConfig, "weather": WeatherConfig, "veil": VeilConfig}
    optional |= {"detail": DetailConfig}
    sections.update({name: section for name, section in optional.items() if values.get(name) is not None})
    values.update({key: build_config(section, values[key], key) for key, section in sections.items()})
    config: ModelConfig = build_config(ModelConfig, values, "config")
    return config


def build_config(section: type, values: Mapping[str, Any], where: str) -> Any:
    """A config dataclass from JSON or TOML values, each checked against its annotation.

    An absent field takes its default, so that a setting added later, whose default is the old behaviour, does not make
    older files unreadable; an unknown field means that a newer release wrote the file.
    Raises ConfigError for an unknown field or a value that does not fit, TypeError for a missing one.
    """
    hints = typing.get_type_hints(section)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(f"{where} has settings this release does not know: {', '.join(unknown)}")
    arguments = {key: _frozen(value) for key, value in values.items()}
    for key, value in arguments.items():
        if not _is_a(value, hints[key]):
            raise ConfigError(f"{where}.{key} cannot be {value!r}")
    return section(**arguments)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits one of the annotations that the configs use."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in value.items()
        )
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return len(kinds) == len(value) and all(map(_is_a, value, kinds))
    if isinstance(value, bool) and hint is not bool:
        return False  # bool is an int to Python, not to a config
    return isinstance(value, (int, float) if hint is float else hint)

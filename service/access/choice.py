"""Which store of keys the settings ask for."""

from __future__ import annotations

from service.access.keys import FileKeys, KeyStore, file_of
from service.terms.settings import Settings, SettingsError


def build_keys(settings: Settings) -> KeyStore:
    """Where API keys are kept. Raises SettingsError if that is nowhere."""
    if (path := file_of(settings.auth.keys)) is not None:
        return FileKeys(path)
    if settings.auth.keys != "redis":
        raise SettingsError("name the place of the keys: RECOFUSE_AUTH__KEYS=file:PATH, or redis")
    from service.access.redis import RedisKeys  # processes without Redis do not pay for it

    return RedisKeys(settings.queue)

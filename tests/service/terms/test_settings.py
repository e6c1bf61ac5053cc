"""Settings come from names that exist, with values that make sense, and are described."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.terms.settings import Settings, SettingsError, variable_of


def test_values_come_from_a_mapping() -> None:
    settings = Settings.from_environment(
        {"RECOFUSE_BATCH__MAX_WAIT_S": "0.02", "RECOFUSE_BATCH__SIZES": "1,4,8,", "HOME": "/home/me"}
    )
    assert settings.batch.max_wait_s == 0.02
    assert settings.batch.sizes == (1, 4, 8)
    assert settings.http == Settings().http


def test_a_misspelt_name_stops_and_is_helped() -> None:
    with pytest.raises(SettingsError, match=r"RECOFUSE_BATCH__MAXWAIT_S .*RECOFUSE_BATCH__MAX_WAIT_S"):
        Settings.from_environment({"RECOFUSE_BATCH__MAXWAIT_S": "1"})
    assert Settings.from_environment({"RECOFUSE_OTHER": "1"}, ignore=frozenset({"RECOFUSE_OTHER"})) == Settings()


def test_links_to_services_are_no_settings() -> None:
    links = {
        "RECOFUSE_API_SERVICE_HOST": "10.0.0.1",
        "RECOFUSE_API_SERVICE_PORT": "8000",
        "RECOFUSE_API_SERVICE_PORT_HTTP": "8000",
        "RECOFUSE_API_PORT": "tcp://10.0.0.1:8000",
        "RECOFUSE_API_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "RECOFUSE_API_PORT_8000_TCP_PROTO": "tcp",
        "RECOFUSE_API_PORT_8000_TCP_PORT": "8000",
        "RECOFUSE_API_PORT_8000_TCP_ADDR": "10.0.0.1",
        "RECOFUSE_SERVICE_HOST": "fd00::1",
        "RECOFUSE_PORT": "udp://[fd00::1]:53",
    }
    assert Settings.from_environment(links) == Settings()
    for name, value in (("HTTP_PORT", "8000"), ("HTTP__SERVICE_PORT", "8000"), ("API_SERVICE_PORT", "x")):
        with pytest.raises(SettingsError, match=name):
            Settings.from_environment({f"RECOFUSE_{name}": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP__PORT", "80000"),
        ("HTTP__PORT", "http"),
        ("QUEUE__LEASE_S", "nan"),
        ("QUEUE__LEASE_S", "-1"),
        ("ENGINE__KIND", "magic"),
        ("BATCH__SIZES", "1,two"),
        ("WORKER__HEARTBEAT_S", "14"),
    ],
)
def test_values_that_cannot_be_are_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match="settings are not valid"):
        Settings.from_environment({f"RECOFUSE_{name}": value})


def test_options_are_there_before_settings_are_judged_together() -> None:
    environ = {"RECOFUSE_CODEC__KIND": "ready", "RECOFUSE_ENGINE__MODEL": "mine"}
    with pytest.raises(SettingsError, match="real pictures"):
        Settings.from_environment(environ)
    settings = Settings.from_environment(environ, options={"engine": {"kind": "null"}, "http": {"port": 80}})
    assert (settings.codec.kind, settings.engine.kind, settings.engine.model) == ("ready", "null", "mine")
    assert settings.http.port == 80
    with pytest.raises(SettingsError, match="real pictures"):
        Settings.from_environment({"RECOFUSE_ENGINE__KIND": "null", **environ}, options={"engine": {"kind": "core"}})


def test_settings_do_not_change_but_copies_differ() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.http.port = 1
    changed = settings.replace(http={"port": 1234})
    assert (settings.http.port, changed.http.port) == (8000, 1234)
    with pytest.raises(SettingsError):
        settings.replace(http={"prot": 1})


def test_settings_of_keys() -> None:
    for wrong in ({"keys": "sqlite"}, {"keys": "file:"}, {"cache_s": -1}, {"keys": "redis"}):
        with pytest.raises(SettingsError):
            Settings.from_values({"auth": wrong})
    assert Settings.from_values({"auth": {"keys": "redis"}, "queue": {"url": "redis://localhost"}})


def test_a_value_may_stand_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("redis://:hidden@cache\n")
    settings = Settings.from_environment({"RECOFUSE_QUEUE__URL_FILE": str(secret)})
    assert settings.queue.url == "redis://:hidden@cache"
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.from_environment({"RECOFUSE_QUEUE__URL_FILE": str(tmp_path / "none")})
    with pytest.raises(SettingsError, match="both set"):
        Settings.from_environment({"RECOFUSE_QUEUE__URL_FILE": str(secret), "RECOFUSE_QUEUE__URL": "memory://"})


@pytest.mark.parametrize(("group", "name"), Settings.names())
def test_every_setting_is_described_and_in_the_table(group: str, name: str) -> None:
    field = type(getattr(Settings(), group)).model_fields[name]
    assert field.description
    assert variable_of(group, name) in Settings.table()


def test_the_example_of_an_environment_file_is_up_to_date() -> None:
    example = (Path(__file__).parents[3] / ".env.example").read_text("utf-8")
    assert example.endswith(f"\n{Settings.as_environment()}\n"), "run `make docs`"

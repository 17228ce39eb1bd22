"""What a configuration takes from the environment."""

from pathlib import Path

import pytest

from leasehold.controller.config import ControllerConfig
from leasehold.runtime.config import ConfigError, load


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "controller.toml"
    file.write_text(text)
    return file


def test_texts_paths_and_lists_take_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", "node-7")
    monkeypatch.setenv("IP", "10.1.2.3")
    monkeypatch.setenv("ODD", "${NODE}")
    config = load(
        ControllerConfig,
        written(
            tmp_path,
            """
            name = "${NODE}"
            state_dir = "/var/lib/${NODE}-${IP}"
            listen = "0.0.0.0:7401"
            advertise = "${IP}:7401"
            insecure = true
            host = "$NODE {NODE} ${ODD}"
            [data]
            host = "${IP}"
            [etcd]
            endpoints = ["http://${IP}:2379"]
            """,
        ),
    )
    assert (config.name, config.state_dir) == ("node-7", Path("/var/lib/node-7-10.1.2.3"))
    assert config.listening.endpoint(7401) == "10.1.2.3:7401"
    assert config.data.advertised == "10.1.2.3"
    assert config.etcd.endpoints == ("http://10.1.2.3:2379",)
    # Only the one form is a variable, and what one holds is taken as it stands.
    assert config.host == "$NODE {NODE} ${NODE}"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_says_nothing(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IP", raising=False)
    if value is not None:
        monkeypatch.setenv("IP", value)
    file = written(tmp_path, 'name = "a"\nstate_dir = "/s"\n[data]\nhost = "${IP}"\n')
    with pytest.raises(ConfigError) as raised:
        load(ControllerConfig, file)
    assert str(raised.value) == (
        f"{file}: data.host: ${{IP}} is empty: set IP in the environment, or write the value"
    )


def test_a_node_whose_name_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", "n" * 64)
    with pytest.raises(ConfigError, match=r"controller 'n+' is not an id: 1 to 63 of"):
        load(ControllerConfig, written(tmp_path, 'name = "${NODE}"\nstate_dir = "/s"\n'))

"""Where a daemon may listen, under which certificate, and what it says of settings that do not do."""

from pathlib import Path

import pytest

from authority import Authority
from leasehold.controller.config import ControllerConfig, DataSettings
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.runtime.config import ConfigError, load
from leasehold.runtime.listening import Address, Listening


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ca")


@pytest.mark.parametrize("text", ["127.0.0.1:7400", "[::1]:0", "a.storage.lan:65535", "localhost:1"])
def test_an_address_is_written_as_it_was_read(text: str) -> None:
    assert str(Address.parse("listen", text)) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("localhost", "the port is a number"),
        ("localhost:", "the port is a number"),
        ("localhost:65536", "the port is a number"),
        ("localhost:-1", "the port is a number"),
        ("::1:7400", "stands in brackets, as in"),
        ("[127.0.0.1]:7400", "not an IPv6 address"),
        ("[::1:7400", "stands in brackets, as in"),
        (":7400", "neither a host's name nor an IP address"),
        ("10.0.0.256:7400", "neither a host's name nor an IP address"),
        ("http//a:7400", "neither a host's name nor an IP address"),
    ],
)
def test_what_is_no_address(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Address.parse("listen", text)


@pytest.mark.parametrize(
    ("listening", "complaint"),
    [
        ({"listen": "10.0.0.1:1"}, r"under \[tls\], or insecure = true"),
        ({"listen": "[fd00::1]:1"}, r"under \[tls\], or insecure = true"),
        ({"listen": "host:1"}, r"under \[tls\], or insecure = true"),
        ({"listen": "0.0.0.0:1", "insecure": True}, "set advertise to the host:port"),
        ({"listen": "[::]:1", "insecure": True}, "set advertise to the host:port"),
        ({"listen": "[::]:1", "insecure": True, "advertise": "[::]:1"}, "nowhere to be reached"),
        ({"listen": "127.0.0.1:1", "advertise": "host:0"}, "nowhere to be reached"),
        ({"listen": "127.0.0.1:1", "advertise": "host"}, "advertise 'host' is not host:port"),
    ],
)
def test_settings_that_do_not_do(listening: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Listening(**listening)  # type: ignore[arg-type]


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "localhost:1"])
def test_the_loopback_needs_no_certificate(listen: str) -> None:
    assert Listening(listen).endpoint(7) == listen.removesuffix("1") + "7"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"listen_host": "0.0.0.0"}, "set host to the name or address"),
        ({"listen_host": "::"}, "set host to the name or address"),
        ({"host": "[::1]"}, "only with a port"),
        ({"host": "a:1"}, "neither a host's name"),
    ],
)
def test_data_addresses_that_do_not_do(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DataSettings(**settings)  # type: ignore[arg-type]


def test_both_daemons_refuse_an_open_listener(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('name = "a"\nlisten = "10.0.0.1:1"\n')
    with pytest.raises(ConfigError, match="insecure = true"):
        load(CoordinatorConfig, file)
    file.write_text(f'name = "a"\nstate_dir = "{tmp_path}"\nlisten = "10.0.0.1:1"\n')
    with pytest.raises(ConfigError, match="insecure = true"):
        load(ControllerConfig, file)


def test_files_are_read_with_the_configuration(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.sign("a")
    other, other_key = authority.sign("b")
    absent = tmp_path / "absent"

    def refused(table: str, *, cert: Path, key: Path, ca: Path = authority.certificate) -> str:
        file = tmp_path / "a.toml"
        file.write_text(
            f'name = "a"\n[{table}]\ncert_file = "{cert}"\nkey_file = "{key}"\nca_file = "{ca}"\n'
            + ('endpoints = ["https://127.0.0.1:1"]\n' if table == "etcd" else "")
        )
        with pytest.raises(ConfigError) as caught:
            load(CoordinatorConfig, file)
        return str(caught.value)

    for table in ("tls", "etcd"):
        assert f"cert_file {absent}: No such file" in refused(table, cert=absent, key=key)
        assert "do not belong together" in refused(table, cert=certificate, key=other_key)
        assert "no unencrypted private key" in refused(table, cert=certificate, key=other)
        assert f"ca_file {key}: holds no certificate" in refused(table, cert=other, key=other_key, ca=key)


def test_insecure_and_tls_contradict_each_other(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.sign("c")
    file = tmp_path / "a.toml"
    file.write_text(f'name = "a"\ninsecure = true\n[tls]\ncert_file = "{certificate}"\nkey_file = "{key}"\n')
    with pytest.raises(ConfigError, match="remove one of them"):
        load(CoordinatorConfig, file)

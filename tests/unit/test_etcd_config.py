"""Where etcd is: what is accepted, and what the operator is told."""

from pathlib import Path

import pytest

from leasehold.store.connection import Backoff, EtcdConfig


def test_endpoints_become_targets() -> None:
    config = EtcdConfig(("http://etcd-1:2379", "http://127.0.0.1:2380", "http://[::1]:2381"))
    assert config.targets == ("etcd-1:2379", "127.0.0.1:2380", "[::1]:2381")
    assert not config.secure
    assert EtcdConfig(("https://a:1",), ca_file=Path("ca.pem")).secure


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("etcd:2379", "scheme"),
        ("127.0.0.1:2379", "scheme"),
        ("grpc://a:1", "scheme is 'grpc'"),
        ("http://etcd", "no port"),
        ("http://:2379", "no host"),
        ("http://a:0", "no port"),
        ("http://a:99999", "Port out of range"),
        ("http://a:port", "not of the form"),
        ("http://a:1/v3", "more than a host and a port"),
        ("http://a:1/", "more than a host and a port"),
        ("http://user@a:1", "more than a host and a port"),
        ("http://a:1?x", "more than a host and a port"),
        ("http://a:1 ", "not of the form"),
        ("http://a:1,http://b:1", "not of the form"),
        ("", "scheme"),
    ],
)
def test_an_endpoint_that_is_none_is_named_with_the_reason(endpoint: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        EtcdConfig((endpoint,))
    assert repr(endpoint) in str(caught.value)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="no etcd endpoint"):
        EtcdConfig(())
    with pytest.raises(ValueError, match="mix http and https"):
        EtcdConfig(("http://a:1", "https://b:1"))
    with pytest.raises(ValueError, match="given twice"):
        EtcdConfig(("http://a:1", "http://a:1"))
    with pytest.raises(ValueError, match="together"):
        EtcdConfig(("https://a:1",), cert_file=Path("cert.pem"))
    with pytest.raises(ValueError, match="endpoints are http"):
        EtcdConfig(("http://a:1",), ca_file=Path("ca.pem"))
    with pytest.raises(ValueError, match="more than 0 seconds"):
        EtcdConfig(("http://a:1",), timeout=0)


def test_every_endpoint_is_tried_before_the_first_pause() -> None:
    backoff = Backoff(3)
    pauses = [backoff.next() for _ in range(60)]
    assert [bool(pause) for pause in pauses] == [False, False, True] * 20
    assert 0 < pauses[2] <= 0.05
    assert 0.5 <= pauses[-1] <= 1.0
    backoff.reset()
    assert backoff.next() == 0.0

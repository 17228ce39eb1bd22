"""What a file of devices may say, and how it is told that it says something else."""

import pytest

from leasehold.client import exits
from leasehold.client.manifest import BadFile, Entry, difference, parse
from leasehold.client.policies import Policies
from leasehold.v1 import devices_pb2, records_pb2


def test_one_device_and_the_defaults_of_its_fields() -> None:
    assert parse("device: d1", "f") == [Entry("f, device number 1 (d1)", "d1")]


def test_every_field() -> None:
    (entry,) = parse(
        "{device: d1, driver: exec, parameters: {backing: /x, mode: '0644'}, controllers: [b, a], "
        "ttl_seconds: 20, takeover: strict, version: 1, etag: '7', path_template: '{path}?x', "
        "labels: {pool: gold, kind: tape}, preemption: at-safe-point, preemption_grace_seconds: 60, "
        "min_hold_seconds: 300, cool_down_seconds: 30, fail_back: preferred}",
        "f",
    )
    assert entry.driver == "exec"
    assert entry.parameters == {"backing": "/x", "mode": "0644"}
    assert (entry.controllers, entry.ttl, entry.strict, entry.etag) == (("b", "a"), 20, True, "7")
    assert entry.path_template == "{path}?x"
    assert entry.policies == Policies(
        labels={"pool": "gold", "kind": "tape"},
        preemption="at-safe-point",
        preemption_grace=60,
        min_hold=300,
        cool_down=30,
        fail_back="preferred",
    )


def test_documents_and_lists() -> None:
    text = "---\ndevice: d1\n---\n- device: d2\n- device: d3\n---\n"
    assert [entry.device for entry in parse(text, "f")] == ["d1", "d2", "d3"]


@pytest.mark.parametrize("takeover", ["hold-off", "HOLD_OFF", "TAKEOVER_POLICY_HOLD_OFF"])
def test_what_get_prints_is_taken_with_its_etag(takeover: str) -> None:
    text = (
        f"- device: {{version: 1, device: d1, driver: nbd, takeover: {takeover}}}\n  etag: '12'\n  queued: 3"
    )
    assert parse(text, "f") == [Entry("f, device number 1 (d1)", "d1", etag="12")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no device"),
        ("[1]", "it is no device"),
        ("just words", "it is no device"),
        ("{", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("driver: nbd", "device: must be a text and is empty: say what it is"),
        ("device: 12", "device: must be a text and is a number: put it in quotes"),
        ("device: ''", "device: must not be empty"),
        ("{device: d, size: 3}", "size: is no field of a device; there are device, driver"),
        ("{device: d, driver: 2026-01-31}", "driver: must be a text and is a date"),
        ("{device: d, parameters: {on: x}}", "parameters: must be a text and is true or false"),
        ("{device: d, parameters: {mode: 0644}}", "parameters.mode: must be a text and is a number"),
        ("{device: d, parameters: [x]}", "parameters: must be a mapping"),
        ("{device: d, controllers: a}", "controllers: must be a list, best first"),
        ("{device: d, controllers: [1]}", "controllers: must be a text and is a number"),
        ("{device: d, ttl_seconds: soon}", "ttl_seconds: must be a whole number of seconds"),
        ("{device: d, ttl_seconds: -1}", "ttl_seconds: must be a whole number of seconds"),
        ("{device: d, ttl_seconds: true}", "ttl_seconds: must be a whole number of seconds"),
        ("{device: d, takeover: never}", "takeover: must be hold-off or strict, and is 'never'"),
        ("{device: d, labels: [gold]}", "labels: must be a mapping, such as {pool: gold}"),
        ("{device: d, labels: {size: 3}}", "labels.size: must be a text and is a number: put it in quotes"),
        (
            "{device: d, preemption: always}",
            "preemption: must be one of never, lower, at-safe-point, and is 'always'",
        ),
        ("{device: d, preemption_grace_seconds: 1m}", "preemption_grace_seconds: must be a whole number"),
        (
            "{device: d, min_hold_seconds: -1}",
            "min_hold_seconds: must be a whole number of seconds, 0 for n",
        ),
        ("{device: d, cool_down_seconds: 1.5}", "cool_down_seconds: must be a whole number of seconds"),
        ("{device: d, fail_back: home}", "fail_back: must be one of stay, preferred, and is 'home'"),
        ("{device: d, version: 2}", "version: must be 1"),
        ("device: d\ndevice: e", "line 2: device stands there twice"),
        ("device: d\n---\ndevice: d", "device: d stands there already, as f, device number 1"),
    ],
)
def test_what_is_wrong_is_named(text: str, told: str) -> None:
    with pytest.raises(BadFile) as caught:
        parse(text, "f")
    assert told in str(caught.value)
    assert str(caught.value).startswith("f")
    assert exits.code_of(caught.value) == exits.BAD_REQUEST


def test_the_place_in_a_long_file_is_named() -> None:
    with pytest.raises(BadFile, match=r"f, device number 2 \(e\): ttl_seconds"):
        parse("- device: d\n- {device: e, ttl_seconds: x}", "f")


def test_the_difference_is_told_by_field() -> None:
    spec = records_pb2.Device(
        device="d", driver="nbd", parameters={"backing": "/a", "old": "x"}, controllers=["a"], ttl_seconds=5
    )
    (entry,) = parse("{device: d, parameters: {backing: /b}, controllers: [a], takeover: strict}", "f")
    assert difference(entry, devices_pb2.DeviceStatus(device=spec)) == [
        "  - parameters.backing: /a",
        "  + parameters.backing: /b",
        "  - parameters.old: x",
        "  - takeover: hold-off",
        "  + takeover: strict",
        "  - ttl_seconds: 5",
        "  + ttl_seconds: default",
    ]


def test_the_difference_between_policies() -> None:
    spec = records_pb2.Device(
        device="d",
        driver="nbd",
        labels={"pool": "gold", "old": "x"},
        preemption=records_pb2.PREEMPTION_POLICY_LOWER,
        min_hold_seconds=5,
    )
    (entry,) = parse("{device: d, labels: {pool: tin}, cool_down_seconds: 7, fail_back: preferred}", "f")
    assert difference(entry, devices_pb2.DeviceStatus(device=spec)) == [
        "  + cool_down_seconds: 7",
        "  + fail_back: preferred",
        "  - labels.old: x",
        "  - labels.pool: gold",
        "  + labels.pool: tin",
        "  - min_hold_seconds: 5",
        "  - preemption: lower",
    ]


@pytest.mark.parametrize("word", ["AT_SAFE_POINT", "PREEMPTION_POLICY_AT_SAFE_POINT", "at-safe-point"])
def test_policies_as_get_prints_them(word: str) -> None:
    text = f"{{device: {{device: d, preemption: {word}, fail_back: FAIL_BACK_POLICY_UNSPECIFIED}}}}"
    assert parse(text, "f")[0].policies == Policies(preemption="at-safe-point")


def test_no_difference_but_in_words() -> None:
    spec = records_pb2.Device(
        version=1, device="d", driver="nbd", takeover=records_pb2.TAKEOVER_POLICY_HOLD_OFF
    )
    for text in ("device: d", "{device: d, takeover: hold-off, ttl_seconds: 0, controllers: []}"):
        assert difference(parse(text, "f")[0], devices_pb2.DeviceStatus(device=spec)) == []

"""What a controller's configuration says of the host it runs on."""

import socket
from pathlib import Path

import pytest

from leasehold.controller.config import ControllerConfig


def test_the_host_is_the_machine_unless_it_is_named() -> None:
    assert ControllerConfig(name="a", state_dir=Path("/s")).host == socket.gethostname()
    assert ControllerConfig(name="a", state_dir=Path("/s"), host="node-7").host == "node-7"


@pytest.mark.parametrize("host", ["a\nb", "x" * 254])
def test_a_host_that_nothing_can_show(host: str) -> None:
    with pytest.raises(ValueError, match=r"^host '.*' is not printable or longer than 253 characters$"):
        ControllerConfig(name="a", state_dir=Path("/s"), host=host)

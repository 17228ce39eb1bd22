"""Images and the topology. Without an engine everything here is skipped, by name."""

import os
import subprocess
from pathlib import Path

import pytest

from equipment import missing

ROOT = Path(__file__).parents[2]
BASE = "leasehold-test-base:1"
# Nothing can be pulled where these tests have to run, and everything started here is ended here.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"


def run(*command: str, context: bytes | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, input=context, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode()


@pytest.fixture(scope="session")
def base() -> str:
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        missing("docker", "no container engine answers")
    run("tests/tools/base-image", BASE)
    return BASE


def build(tag: str, base: str, context: bytes | None) -> str:
    """An image of the tree, or of the sources in `context`, a tar archive."""
    arguments = ("--build-arg", f"BASE={base}", "--build-arg", "PACKAGES=")
    options = (*arguments, "-f", "deploy/Dockerfile", "-t", tag)
    run("docker", "build", "--quiet", *options, "." if context is None else "-", context=context)
    return tag


@pytest.fixture(scope="session")
def image(base: str) -> str:
    return build("leasehold-test:current", base, None)


@pytest.fixture(scope="session")
def previous(base: str) -> str | None:
    """That of the commit before; None where that is not known."""
    archived = subprocess.run(["git", "archive", "HEAD~1"], cwd=ROOT, capture_output=True, check=False)
    if archived.returncode:
        return None
    return build("leasehold-test:previous", base, archived.stdout)


@pytest.fixture(scope="session")
def etcd_image(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    binary = Path(os.environ.get("LEASEHOLD_ETCD", ""))
    if not binary.is_file():
        missing("etcd", "LEASEHOLD_ETCD names no current etcd")
    context = tmp_path_factory.mktemp("etcd")
    (context / "etcd").write_bytes(binary.read_bytes())
    (context / "etcd").chmod(0o755)
    (context / "Dockerfile").write_text(f"FROM {base}\nCOPY etcd /usr/local/bin/etcd\n")
    run("docker", "build", "--quiet", "-t", "leasehold-test-etcd:1", str(context))
    return "leasehold-test-etcd:1"

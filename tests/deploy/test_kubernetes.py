"""What deploy/kubernetes renders to: valid, as tight as it can be, and in agreement with the code.

There is no cluster in this: schemas of Kubernetes, and rules of our own over what kustomize prints.
"""

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from equipment import find_tool
from leasehold.client import manifest
from leasehold.controller.config import ControllerConfig
from leasehold.controller.timing import Timing
from leasehold.coordinator.command import GRACE
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.runtime.config import ConfigError, load

pytestmark = pytest.mark.needs("kustomize")

OVERLAYS = Path(__file__).parents[2] / "deploy/kubernetes/overlays"
NAMES = sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))
OLDEST = "1.30"
COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> tuple[Object, ...]:
    command = [find_tool("kustomize"), "build", str(OVERLAYS / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    # What is deprecated is told there.
    assert done.stderr == ""
    return tuple(yaml.safe_load_all(done.stdout))


def of(overlay: str, *kinds: str) -> list[Object]:
    return [item for item in rendered(overlay) if item["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Object:
    (found,) = [item for item in of(overlay, kind) if item["metadata"]["name"] == name]
    return found


def workloads(overlay: str) -> list[Object]:
    return of(overlay, "Deployment", "DaemonSet", "StatefulSet", "Job", "CronJob")


def template(workload: Object) -> Object:
    spec = workload["spec"]
    found: Object = (spec["jobTemplate"]["spec"] if workload["kind"] == "CronJob" else spec)["template"]
    return found


def labels(workload: Object) -> dict[str, str]:
    found: dict[str, str] = template(workload)["metadata"]["labels"]
    return found


def containers(overlay: str) -> Iterator[tuple[Object, Object, Object]]:
    """Each with its workload and its pod."""
    for workload in workloads(overlay):
        pod = template(workload)["spec"]
        assert "initContainers" not in pod
        for container in pod["containers"]:
            yield workload, pod, container


def mounting(workload: Object, overlay: str) -> bool:
    return workload["kind"] == "DaemonSet" and overlay == "privileged"


def selects(selector: Object, found: dict[str, str]) -> bool:
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if found.get(rule["key"]) not in rule["values"]:
            return False
    return all(found.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def config_map(overlay: str, prefix: str) -> dict[str, str]:
    (found,) = [
        item["data"]
        for item in of(overlay, "ConfigMap")
        if re.fullmatch(rf"{prefix}-[a-z0-9]{{10}}", item["metadata"]["name"])
    ]
    return dict(found)


def configured(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str = "node-7"
) -> tuple[CoordinatorConfig, ControllerConfig]:
    """Both, as their pods would read them: with what their containers have in the environment."""
    values = {"metadata.name": "coordinator-7d9f8b6c5d-x2x4z", "status.podIP": "10.1.2.3"}
    values["spec.nodeName"] = node
    for _, _, container in containers(overlay):
        for entry in (
            container.get("env", ()) if container["image"].split(":")[0].endswith("leasehold") else ()
        ):
            field = entry.get("valueFrom", {}).get("fieldRef")
            monkeypatch.setenv(entry["name"], values[field["fieldPath"]] if field else entry["value"])
    for name in ("coordinator", "controller"):
        (tmp_path / name).write_text(config_map(overlay, name)[f"{name}.toml"])
    return load(CoordinatorConfig, tmp_path / "coordinator"), load(ControllerConfig, tmp_path / "controller")


@pytest.mark.parametrize("overlay", NAMES)
def test_kubernetes_would_take_it(overlay: str) -> None:
    for version in (OLDEST, kubernetes_validate.latest_version()):
        for item in rendered(overlay):
            kubernetes_validate.validate(item, version, strict=True)
    names = [(item["kind"], item["metadata"]["name"]) for item in rendered(overlay)]
    assert len(set(names)) == len(names)
    for item in rendered(overlay):
        cluster_wide = item["kind"] in ("Namespace", "PriorityClass")
        assert cluster_wide or item["metadata"]["namespace"] == "leasehold", item["metadata"]["name"]


def test_a_field_that_does_not_exist_is_refused() -> None:
    wrong = dict(named("unprivileged", "Service", "coordinator"))
    wrong["spec"] = wrong["spec"] | {"selektor": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


@pytest.mark.parametrize("overlay", NAMES)
def test_every_container_is_looked_after(overlay: str) -> None:
    for workload, pod, container in containers(overlay):
        what = f"{workload['metadata']['name']}/{container['name']}"
        runs_on = workload["kind"] not in ("Job", "CronJob")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert (probe in container) == runs_on, f"{what} {probe}"
        # Without etcd a daemon still serves, and is not to be restarted for that.
        assert "service" not in container.get("livenessProbe", {}).get("grpc", {})
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), what
        assert "memory" in container["resources"]["limits"], what
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", container["image"]), container["image"]
        mounted = [item["name"] for item in container.get("volumeMounts", ())]
        mounted += [item["name"] for item in container.get("volumeDevices", ())]
        there = [item["name"] for item in pod.get("volumes", ())]
        there += [item["metadata"]["name"] for item in workload["spec"].get("volumeClaimTemplates", ())]
        assert sorted(mounted) == sorted(there), what


@pytest.mark.parametrize("overlay", NAMES)
def test_every_container_may_do_as_little_as_its_kind_can(overlay: str) -> None:
    accounts = {item["metadata"]["name"]: item for item in of(overlay, "ServiceAccount")}
    for workload, pod, container in containers(overlay):
        what = f"{workload['metadata']['name']}/{container['name']}"
        context = container["securityContext"]
        assert not pod["automountServiceAccountToken"], what
        assert not accounts[pod["serviceAccountName"]]["automountServiceAccountToken"], what
        assert not pod.keys() & {"hostPID", "hostIPC"}, what
        assert context["readOnlyRootFilesystem"], what
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, what
        paths = {item["hostPath"]["path"] for item in pod.get("volumes", ()) if "hostPath" in item}
        outwards = [item["name"] for item in container["volumeMounts"] if "mountPropagation" in item]
        if mounting(workload, overlay):
            assert context["privileged"]
            assert paths == {"/var/lib/leasehold", "/run/leasehold/mnt", "/dev"}
            assert outwards == ["mounts"]
            continue
        assert context == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }, what
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 65532)
        assert paths == ({"/var/lib/leasehold"} if workload["kind"] == "DaemonSet" else set()), what
        assert not outwards, what
        assert pod.get("hostNetwork", False) == (overlay == "host-network" and bool(paths)), what


@pytest.mark.parametrize("overlay", NAMES)
def test_whatever_selects_selects_what_it_means(overlay: str) -> None:
    pods = [labels(workload) for workload in workloads(overlay)]
    for workload in of(overlay, "Deployment", "DaemonSet", "StatefulSet"):
        assert selects(workload["spec"]["selector"], labels(workload))
        assert [selects(workload["spec"]["selector"], pod) for pod in pods].count(True) == 1
        for spread in template(workload)["spec"].get("topologySpreadConstraints", ()):
            assert selects(spread["labelSelector"], labels(workload))
    for budget in of(overlay, "PodDisruptionBudget"):
        name = budget["metadata"]["name"]
        (found,) = [item for item in workloads(overlay) if selects(budget["spec"]["selector"], labels(item))]
        assert found["metadata"]["name"] == name
        # Of pods that no scale is known of, Kubernetes takes no other form.
        form = {"minAvailable": 1} if found["kind"] == "DaemonSet" else {"maxUnavailable": 1}
        assert form.items() <= budget["spec"].items()
    assert len(of(overlay, "PodDisruptionBudget")) == 3
    for service in of(overlay, "Service"):
        (found,) = [
            item for item in workloads(overlay) if service["spec"]["selector"].items() <= labels(item).items()
        ]
        (container,) = template(found)["spec"]["containers"]
        by_name = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert by_name[port["targetPort"]] == port["port"]
    for workload, pod, _ in containers(overlay):
        if workload["kind"] == "DaemonSet":
            classes = [item["metadata"]["name"] for item in of(overlay, "PriorityClass")]
            assert [pod["priorityClassName"]] == classes
    claims = {item["metadata"]["name"] for item in of(overlay, "PersistentVolumeClaim")}
    maps = {item["metadata"]["name"] for item in of(overlay, "ConfigMap")}
    volumes = [volume for _, pod, _ in containers(overlay) for volume in pod.get("volumes", ())]
    assert {
        v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v
    } == claims
    assert {v["configMap"]["name"] for v in volumes if "configMap" in v} == maps


def allowed(overlay: str, direction: str, pod: dict[str, str], peer: dict[str, str]) -> set[int]:
    """The TCP ports that policies for `pod` allow with a `peer` of the same namespace."""
    ports: set[int] = set()
    for policy in of(overlay, "NetworkPolicy"):
        spec = policy["spec"]
        if not selects(spec["podSelector"], pod) or direction.capitalize() not in spec["policyTypes"]:
            continue
        for rule in spec.get(direction, ()):
            peers = rule["from" if direction == "ingress" else "to"]
            if any(set(item) == {"podSelector"} and selects(item["podSelector"], peer) for item in peers):
                for port in rule["ports"]:
                    ports.update(range(port["port"], port.get("endPort", port["port"]) + 1))
    return ports


@pytest.mark.parametrize("overlay", NAMES)
def test_only_those_reach_each_other_who_have_to(overlay: str) -> None:
    deny = named(overlay, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of(overlay, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        assert not selector or any(selects(selector, labels(item)) for item in workloads(overlay))
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            # Without either it would be from everybody, or to every port.
            assert rule["ports"]
            assert rule.get("from") or rule.get("to")
    pods = {labels(item)[COMPONENT]: labels(item) for item in workloads(overlay)}
    data = {10809, 10810}
    reach = {
        ("controller", "coordinator"): {7400},
        ("coordinator", "coordinator"): {7400},
        ("coordinator", "controller"): {7401},
        ("coordinator", "etcd"): {2379},
        ("controller", "etcd"): {2379},
        ("etcd", "etcd"): {2380},
    }
    for client in ("apply-devices", "backup"):
        reach[client, "coordinator"] = {7400}
        reach[client, "controller"] = {7401} | data
    assert set(pods) == {"coordinator", "controller", "etcd", "apply-devices", "backup"}
    for source, of_source in pods.items():
        for target, of_target in pods.items():
            expected = reach.get((source, target), set())
            assert allowed(overlay, "ingress", of_target, of_source) == expected, (source, target)
            assert allowed(overlay, "egress", of_source, of_target) == expected, (source, target)
    assert allowed(overlay, "ingress", pods["controller"], {"app": "another"}) == set()


@pytest.mark.parametrize("overlay", NAMES)
def test_the_daemons_take_their_configuration(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, controller = configured(overlay, tmp_path, monkeypatch)
    assert (coordinator.name, controller.name) == ("coordinator-7d9f8b6c5d-x2x4z", "node-7")
    assert controller.host == "node-7"
    assert (coordinator.advertise, controller.advertise) == ("10.1.2.3:7400", "10.1.2.3:7401")
    assert controller.data.advertised == "10.1.2.3"
    assert ("filesystem" in controller.drivers) == (overlay == "privileged")
    etcd = named(overlay, "StatefulSet", "etcd")
    members = tuple(f"http://etcd-{number}.etcd:2379" for number in range(etcd["spec"]["replicas"]))
    assert coordinator.etcd.endpoints == controller.etcd.endpoints == members
    for kind, name, config in (
        ("Deployment", "coordinator", coordinator),
        ("DaemonSet", "controller", controller),
    ):
        (container,) = template(named(overlay, kind, name))["spec"]["containers"]
        port = config.listening.address.port
        ports = [item["containerPort"] for item in container["ports"]]
        assert ports[0] == port
        if isinstance(config, ControllerConfig):
            assert ports[1:] == [config.data.base_port + number for number in range(config.data.workers)]
            mounts = {item["mountPath"] for item in container["volumeMounts"]}
            assert {str(config.state_dir), str(config.data.gate_dir)} <= mounts
            assert ("filesystem" not in config.drivers) or str(config.filesystem.root) in mounts
            hosts = [item.get("hostPort") for item in container["ports"]]
            assert hosts == (ports if overlay == "host-network" else [None] * 3)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == port
        assert container["args"] == [name, "--config", f"/etc/leasehold/{name}.toml"]


def test_a_node_whose_name_is_too_long_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is not an id: 1 to 63 of"):
        configured("unprivileged", tmp_path, monkeypatch, node="n" * 64)


@pytest.mark.parametrize("overlay", NAMES)
def test_who_stops_has_the_time_to_pass_devices_on(overlay: str) -> None:
    controller = named(overlay, "DaemonSet", "controller")
    pod = template(controller)["spec"]
    # As much again for what comes after the devices.
    assert pod["terminationGracePeriodSeconds"] >= 2 * Timing().stop
    assert "lifecycle" not in pod["containers"][0]
    assert controller["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    pod = template(named(overlay, "Deployment", "coordinator"))["spec"]
    waits = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits + GRACE + 5


@pytest.mark.parametrize("overlay", NAMES)
def test_the_devices_are_such_as_its_controllers_serve(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, controller = configured(overlay, tmp_path, monkeypatch)
    (container,) = template(named(overlay, "DaemonSet", "controller"))["spec"]["containers"]
    roots = [item["mountPath"] for item in container["volumeMounts"]]
    devices = [item["devicePath"] for item in container.get("volumeDevices", ())]
    entries = manifest.parse(config_map(overlay, "devices")["devices.yaml"], "devices.yaml")
    assert entries
    for entry in entries:
        assert entry.driver in controller.drivers
        if entry.driver == "nbd":
            backing = entry.parameters["backing"]
            assert backing in devices or backing.rpartition("/")[0] in roots
    (container,) = template(named(overlay, "Job", "apply-devices"))["spec"]["containers"]
    assert container["args"] == ["apply", "--yes", "--file", "/etc/leasehold/devices.yaml"]
    assert named(overlay, "CronJob", "backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"][
        "containers"
    ][0]["args"][1] in [entry.device for entry in entries]

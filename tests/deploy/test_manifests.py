"""What is in deploy/ is valid Kubernetes, fits together, and our programs take what it says."""

from __future__ import annotations

import copy
import re
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from conserve_sgl import cli, compat
from conserve_sgl.batch.validate import Limits, read_plan
from conserve_sgl.config import ConserveConfig
from conserve_sgl.engine.metrics import METRICS

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy"
FOLDERS = sorted(path.parent.name for path in DEPLOY.glob("*/kustomization.yaml"))
CUSTOM = {
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}
OLDEST = "1.31"  # podFailurePolicy is stable from there on

Object = dict[str, Any]


def kustomization(folder: str) -> Object:
    return yaml.safe_load((DEPLOY / folder / "kustomization.yaml").read_text())


def objects(*folders: str) -> list[Object]:
    """All objects of the folders (of all folders by default), as they stand in the files."""
    files = [
        DEPLOY / f / name for f in folders or FOLDERS for name in kustomization(f)["resources"]
    ]
    return [found for file in files for found in yaml.safe_load_all(file.read_text())]


def named(kind: str, name: str) -> Object:
    (found,) = [o for o in objects() if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


WORKLOADS = [o for o in objects() if o["kind"] in ("Deployment", "Job")]
DEPLOYMENTS = [o for o in WORKLOADS if o["kind"] == "Deployment"]


def name_of(found: Object) -> str:
    return f"{found['kind']}-{found['metadata']['name']}"


def pod(workload: Object) -> Object:
    return workload["spec"]["template"]["spec"]


def container(workload: Object) -> Object:
    (only,) = pod(workload)["containers"]
    return only


def selected(labels: Object) -> list[Object]:
    """The workloads whose pods have the labels."""
    pods = [(w, w["spec"]["template"]["metadata"]["labels"]) for w in WORKLOADS]
    return [w for w, found in pods if labels.items() <= found.items()]


def ports(workload: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(workload)["ports"]}


def command(workload: Object) -> list[str]:
    return [*container(workload)["command"], *container(workload).get("args", [])]


def parsed(words: list[str]) -> tuple[str, dict[str, Any], list[str]]:
    """A command line as our own parser takes it: the command, its options, and what it passes on.

    Raises:
        click.UsageError: it does not.
    """
    program, name, *arguments = words
    assert program == "conserve"
    subcommand = typer.main.get_command(cli.app).commands[name]
    context = subcommand.make_context(name, arguments)
    return name, context.params, context.args


# -------------------------------------------------------------------------------- files and schemas


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_kustomization_lists_every_file_of_its_folder_and_no_other(folder):
    found = kustomization(folder)
    assert found["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert found["kind"] == "Kustomization"
    assert found["namespace"] == named("Namespace", "conserve")["metadata"]["name"]
    keys = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "images"}
    assert set(found) <= keys
    generators = found.get("configMapGenerator", [])
    listed = [*found["resources"], *(file for maps in generators for file in maps["files"])]
    there = {path.name for path in (DEPLOY / folder).iterdir()} - {"kustomization.yaml"}
    assert sorted(listed) == sorted(there)


def test_every_folder_has_a_kustomization():
    assert [path.name for path in sorted(DEPLOY.iterdir()) if path.is_dir()] == FOLDERS
    assert len(FOLDERS) == 6


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("found", objects(), ids=name_of)
def test_an_object_is_what_its_schema_says(found, version):
    if found["kind"] in CUSTOM:
        assert found["apiVersion"] == CUSTOM[found["kind"]]
        assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
        with pytest.raises(kubernetes_validate.SchemaNotFoundError):
            kubernetes_validate.validate(found, version, strict=True)
    else:
        kubernetes_validate.validate(found, version, strict=True)


def test_the_schemas_find_what_is_wrong():
    wrong = named("Deployment", "conserve-server")
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 360
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def test_no_two_objects_have_a_name_but_the_autoscalers():
    names = [name_of(found) for found in objects()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_an_image_is_one_that_the_dockerfile_makes_and_the_kustomization_names(workload):
    image = container(workload)["image"]
    (folder,) = [f for f in FOLDERS if workload in objects(f)]
    assert image in [listed["name"] for listed in kustomization(folder)["images"]]
    target = image.removeprefix("conserve-")
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.MULTILINE)


def test_the_dockerfile_copies_what_is_there_and_installs_what_was_tested():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    files = [name for line in copied for name in line.split()]
    assert "pyproject.toml" in files
    assert all((CHECKOUT / name).exists() for name in files)
    assert f"lmsysorg/sglang:v{compat.TESTED_VERSIONS[-1]}\n" in dockerfile


# -------------------------------------------------------------------------------- what fits to what


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=name_of)
def test_a_deployment_selects_its_own_pods_and_no_others(deployment):
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert [name_of(w) for w in selected(labels)] == [name_of(deployment)]


SERVICES = [o for o in objects() if o["kind"] == "Service"]


@pytest.mark.parametrize("service", SERVICES, ids=name_of)
def test_a_service_finds_pods_with_its_port(service):
    (port,) = service["spec"]["ports"]
    found = selected(service["spec"]["selector"])
    assert found
    for workload in found:
        assert port["targetPort"] in ports(workload)
    if service["spec"].get("clusterIP") == "None":  # no address, so nothing that maps ports
        assert port["port"] == ports(found[0])[port["targetPort"]]


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_volumes_claims_and_maps_are_there(workload):
    volumes = {volume["name"]: volume for volume in pod(workload).get("volumes", [])}
    mounts = [mount["name"] for mount in container(workload).get("volumeMounts", [])]
    assert sorted(mounts) == sorted(volumes)
    (folder,) = [f for f in FOLDERS if workload in objects(f)]
    maps = [found["name"] for found in kustomization(folder).get("configMapGenerator", [])]
    for volume in volumes.values():
        if "configMap" in volume:
            assert volume["configMap"]["name"] in maps
        if "persistentVolumeClaim" in volume:
            named("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=name_of)
def test_probes_ask_a_port_that_is_there(deployment):
    probes = [key for key in container(deployment) if key.endswith("Probe")]
    assert {"readinessProbe", "livenessProbe"} <= set(probes)
    for probe in probes:
        assert container(deployment)[probe]["httpGet"]["port"] in ports(deployment)


MONITORS = [o for o in objects("monitoring") if o["kind"] == "PodMonitor"]


def test_every_deployment_is_scraped_at_a_port_that_it_has():
    scraped = []
    for monitor in MONITORS:
        found = selected(monitor["spec"]["selector"]["matchLabels"])
        scraped += [name_of(w) for w in found]
        for workload in found:
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                assert endpoint["port"] in ports(workload)
    assert sorted(scraped) == sorted(name_of(d) for d in DEPLOYMENTS)


def test_the_disruption_budget_is_for_all_servers():
    budget = named("PodDisruptionBudget", "conserve-server")
    found = {name_of(w) for w in selected(budget["spec"]["selector"]["matchLabels"])}
    assert found == {"Deployment-conserve-server", "Deployment-conserve-batch-api"}


# -------------------------------------------------------------------------------------- the servers


SERVERS = [named("Deployment", name) for name in ("conserve-server", "conserve-batch-api")]


@pytest.mark.parametrize("server", SERVERS, ids=name_of)
def test_a_server_starts_with_a_configuration_that_conserve_takes(server):
    name, options, flags = parsed(command(server))
    assert name == "serve"
    (mount,) = [m for m in container(server)["volumeMounts"] if m["name"] == "config"]
    assert options["config"].parent == Path(mount["mountPath"])
    (folder,) = [f for f in FOLDERS if server in objects(f)]
    config = ConserveConfig.load(DEPLOY / folder / options["config"].name)

    folders = [m["mountPath"] for m in container(server)["volumeMounts"]]
    assert (config.batch.storage_dir is None) == (server is SERVERS[0])
    assert config.batch.storage_dir is None or str(config.batch.storage_dir) in folders

    flags = dict(flag.partition("=")[::2] for flag in flags)
    assert flags["--host"] == "0.0.0.0"
    assert int(flags["--port"]) == ports(server)["http"]
    assert "--enable-metrics" in flags
    refused = {refusal.flag for refusal in compat._REFUSED}
    assert not refused & set(flags)


@pytest.mark.parametrize("server", SERVERS, ids=name_of)
def test_a_server_s_profile_is_on_a_volume(server):
    (folder,) = [
        v["value"] for v in container(server)["env"] if v["name"] == "CONSERVE_PROFILE_DIR"
    ]
    mounts = {m["mountPath"] for m in container(server)["volumeMounts"]}
    assert mounts & {str(parent) for parent in Path(folder).parents}


def test_the_server_with_batches_is_the_others_and_a_disk():
    base, batches = (copy.deepcopy(pod(server)) for server in SERVERS)
    (disk,) = [v for v in batches["volumes"] if v["name"] == "batches"]
    batches["volumes"].remove(disk)
    batches["containers"][0]["volumeMounts"].pop()
    for found, name in ((base, "conserve-config"), (batches, "conserve-batch-api-config")):
        (config,) = [v for v in found["volumes"] if v["name"] == "config"]
        assert config["configMap"].pop("name") == name
    assert batches == base
    assert SERVERS[1]["spec"]["replicas"] == 1
    assert SERVERS[1]["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("server", SERVERS, ids=name_of)
def test_the_grace_period_covers_what_its_comment_counts(server):
    """preStop, the longest answer, two polls of SGLang's, its schedulers, lines of batches."""
    before_stop_s = int(container(server)["lifecycle"]["preStop"]["exec"]["command"][1])
    answer_s = 300
    needed_s = before_stop_s + answer_s + 5 + 5 + 15 + 10
    assert pod(server)["terminationGracePeriodSeconds"] >= needed_s


# -------------------------------------------------------------------------------------- the gateway


GATEWAY = named("Deployment", "conserve-gateway")


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """`--flag=value` and `--flag value value` alike."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values = flags[flag] = [value] if value else []
        else:
            values.append(word)
    return flags


def test_the_gateway_finds_the_servers():
    flags = flags_of(container(GATEWAY)["args"])
    labels = dict(label.split("=") for label in flags["--selector"])
    assert [name_of(w) for w in selected(labels)] == [name_of(s) for s in SERVERS]
    assert {ports(server)["http"] for server in SERVERS} == {
        int(flags["--service-discovery-port"][0])
    }
    assert flags["--service-discovery-namespace"] == ["$(NAMESPACE)"]
    assert "NAMESPACE" in [variable["name"] for variable in container(GATEWAY)["env"]]
    assert int(flags["--port"][0]) == ports(GATEWAY)["http"]
    assert int(flags["--prometheus-port"][0]) == ports(GATEWAY)["metrics"]


def test_the_gateway_may_watch_pods():
    role, binding = named("Role", "conserve-gateway"), named("RoleBinding", "conserve-gateway")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = pod(GATEWAY)["serviceAccountName"]
    assert named("ServiceAccount", account)
    namespace = kustomization("base")["namespace"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    ]


def test_no_answer_of_a_server_closes_the_gateway_to_online_requests():
    """Its circuit breaker counts 429; docs/fleet.md has what that did."""
    flags = flags_of(container(GATEWAY)["args"])
    assert "--disable-circuit-breaker" in flags
    assert "--disable-health-check" not in flags
    assert int(flags["--health-check-timeout-secs"][0]) > 1  # SGLang's /health sleeps for one


def test_the_gateway_takes_its_flags():
    router = pytest.importorskip("sglang_router.launch_router", reason="sglang-router is not here")
    args = router.parse_router_args(container(GATEWAY)["args"])
    assert args.service_discovery
    assert args.disable_circuit_breaker
    assert args.selector["app.kubernetes.io/component"] == "server"


# ------------------------------------------------------------------------ the Job that runs a batch


JOB = named("Job", "conserve-batch")


def test_the_job_s_command_is_one_of_ours_over_files_and_servers_that_are_there():
    name, options, rest = parsed(command(JOB))
    assert (name, rest) == ("run-batch", [])
    mounts = {m["name"]: Path(m["mountPath"]) for m in container(JOB)["volumeMounts"]}
    assert Path(options["output"]).parent == mounts["output"]
    assert Path(options["input"]).parent == mounts["input"]
    (questions,) = kustomization("batch")["configMapGenerator"]
    assert questions["files"] == [Path(options["input"]).name]
    addresses = {
        f"http://{s['metadata']['name']}:{port['port']}".removesuffix(":80")
        for s in SERVICES
        for port in s["spec"]["ports"]
    }
    (batch_api,) = kustomization("batch-api")["configMapGenerator"]
    config = ConserveConfig.load(DEPLOY / "batch-api" / batch_api["files"][0])
    gateway = f"http://{named('Service', 'conserve-gateway')['metadata']['name']}"
    assert options["discover"] == config.batch.discover == gateway
    assert not options["endpoint"]
    instead = re.search(r"# (--endpoint=(\S+)),", (DEPLOY / "batch" / "job.yaml").read_text())
    assert {gateway, instead[2]} <= addresses


def test_the_job_s_questions_are_a_batch():
    file = DEPLOY / "batch" / "questions.jsonl"
    assert read_plan(file, None, Limits()).total == 2


def test_what_an_exit_code_means_to_the_job():
    rules = JOB["spec"]["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    # 2: bad input. 130: interrupted. What is left, 1, counts towards the limit.
    assert codes == {2: "FailJob", 130: "Ignore"}
    assert JOB["spec"]["backoffLimit"] > 0
    assert pod(JOB)["restartPolicy"] == "Never"  # or the API server refuses the policy
    page = (CHECKOUT / "docs" / "batch.md").read_text()
    assert "1 some failed, 2 bad input and nothing sent, 130 interrupted" in page


def test_the_job_s_output_outlives_it():
    (output,) = [v for v in pod(JOB)["volumes"] if v["name"] == "output"]
    assert "persistentVolumeClaim" in output
    options = parsed(command(JOB))[1]
    assert not str(options["output"]).startswith("http")


# --------------------------------------------------------------------------- alerts and autoscalers


def test_the_alerts_are_those_of_docs():
    rules = (CHECKOUT / "docs" / "alerts.yaml").read_text().split("\n", 1)[1]
    manifest = (DEPLOY / "monitoring" / "alerts.yaml").read_text()
    assert manifest.endswith(f"\nspec:\n{textwrap.indent(rules, '  ')}")
    spec = named("PrometheusRule", "conserve")["spec"]
    assert spec == yaml.safe_load(rules)


# Neither counts an offline request: the first at the door, the second because the offline backlog
# never is in SGLang's queue (tests/engine/test_jobs_and_metrics.py).
OF_ONLINE_LOAD = {"conserve:online_arrivals_total", "sglang:num_queue_reqs"}


def test_keda_looks_at_online_load_alone():
    (scaled,) = objects("autoscaling-keda")
    target = named("Deployment", scaled["spec"]["scaleTargetRef"]["name"])
    assert target == SERVERS[0]
    assert scaled["spec"]["minReplicaCount"] <= scaled["spec"]["maxReplicaCount"]
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    asked = {name for query in queries for name in re.findall(r"\w+:\w+", query)}
    assert asked == OF_ONLINE_LOAD
    assert all(float(t["metadata"]["threshold"]) > 0 for t in scaled["spec"]["triggers"])
    assert "conserve:online_arrivals_total" in {metric.name for metric in METRICS}


def test_the_hpa_looks_at_online_load_alone():
    (hpa,) = objects("autoscaling-hpa")
    target = hpa["spec"]["scaleTargetRef"]
    assert (target["kind"], target["apiVersion"]) == ("Deployment", SERVERS[0]["apiVersion"])
    assert named("Deployment", target["name"]) == SERVERS[0]
    asked = {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]}
    text = (DEPLOY / "autoscaling-hpa" / "hpa.yaml").read_text()
    adapter = text[text.index("#   rules:") : text.index("\napiVersion:")]
    (rules,) = yaml.safe_load(re.sub(r"^# ? ?", "", adapter, flags=re.MULTILINE)).values()
    assert {rule["name"]["as"] for rule in rules} == asked
    series = {rule["seriesQuery"].partition("{")[0] for rule in rules}
    assert series == OF_ONLINE_LOAD


def test_both_autoscalers_say_the_same():
    (scaled,), (hpa,) = objects("autoscaling-keda"), objects("autoscaling-hpa")
    assert scaled["spec"]["minReplicaCount"] == hpa["spec"]["minReplicas"]
    assert scaled["spec"]["maxReplicaCount"] == hpa["spec"]["maxReplicas"]
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == hpa["spec"]["behavior"]
    thresholds = [float(t["metadata"]["threshold"]) for t in scaled["spec"]["triggers"]]
    targets = [m["pods"]["target"]["averageValue"] for m in hpa["spec"]["metrics"]]
    assert [float(t) for t in targets] == thresholds


# ------------------------------------------------------------------------------------ docs/fleet.md


PAGE = (CHECKOUT / "docs" / "fleet.md").read_text()


def test_the_page_lists_what_there_is_and_applies_nothing_else():
    listed = re.findall(r"^\| (`.+`) \|", PAGE.split("## The recipe")[0], re.MULTILINE)
    rows = [name for row in listed for name in re.findall(r"`([\w./-]+)`", row)]
    assert sorted(rows) == sorted(["Dockerfile", *(f"{folder}/" for folder in FOLDERS)])
    everywhere = [PAGE, *(path.read_text() for path in DEPLOY.glob("*/kustomization.yaml"))]
    applied = [f for text in everywhere for f in re.findall(r"kubectl apply -k (\S+)", text)]
    assert {f"deploy/{folder}" for folder in FOLDERS} == set(applied) - {"..."}


def test_our_commands_on_the_page_are_ours():
    commands = re.findall(r"^conserve .+$", PAGE, re.MULTILINE)
    assert commands
    for line in commands:
        name, options, rest = parsed(line.split())
        assert not rest
        assert name != "simulate" or (CHECKOUT / options["simulation"]).is_file()


def test_the_autoscalers_stay_below_what_one_server_was_simulated_to_answer():
    rows = re.findall(r"^\| ([\d.]+) \| (\d+) % \|", PAGE, re.MULTILINE)
    most = max(float(rate) for rate, share in rows if int(share) >= 99)
    (scaled,) = objects("autoscaling-keda")
    threshold = float(scaled["spec"]["triggers"][0]["metadata"]["threshold"])
    assert 0.7 * most <= threshold <= 0.8 * most

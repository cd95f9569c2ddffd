"""The files of launch/, as far as they can be tried without their platforms: run with stand-ins for its commands, or
held against what its schema demands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.errors import EXIT_STOPPED, TrainerError

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / "slurm.sbatch", LAUNCH / "gce_spot_startup.sh", ROOT / "prod_train.sh"]
READ = set(re.findall(r"\$\{?!?([A-Z][A-Z_]+)", (ROOT / "prod_train.sh").read_text())) - {"BASH_SOURCE"}
FINAL = sorted(kind.exit_code for kind in TrainerError.__subclasses__() if kind.exit_code not in (1, 4))

# a prod_train.sh that tells what it was given
TELLS = f"""#!/bin/bash
{sys.executable} - "$@" <<'END' > told-${{NODE_RANK:-0}}.json
import json, os, sys
print(json.dumps([dict(os.environ), sys.argv[1:]]))
END
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with such a prod_train.sh, and the commands that a test puts on the PATH."""
    (tmp_path / "prod_train.sh").write_text(TELLS)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in READ:
        if name not in ("PATH", "HOME"):
            monkeypatch.delenv(name, raising=False)

    class Machine:
        folder = tmp_path

        def command(self, name, script):
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/bash\n{script}\n")
            path.chmod(0o755)

        def told(self, rank):
            return json.loads((tmp_path / f"told-{rank}.json").read_text())

    return Machine()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


# ---- Slurm ----

SRUN = """
[[ "$1" = --kill-on-bad-exit=0 ]] && shift
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done
"""


@pytest.fixture
def slurm(machine, monkeypatch):
    given = {"SLURM_SUBMIT_DIR": str(machine.folder), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "41007"}
    for name, value in {**given, "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    machine.command("scontrol", 'echo "$@" >> scontrol.txt; [[ "$1" = show ]] && printf "gpu07\\ngpu08\\n" || true')
    machine.command("srun", SRUN)
    return machine


def test_slurm_starts_the_same_command_on_every_node(slurm, monkeypatch):
    monkeypatch.setenv("DATA", "gs://b/shards")
    batch = ["bash", str(LAUNCH / "slurm.sbatch"), "--run", "big one"]
    assert subprocess.run(batch, timeout=120).returncode == 0
    for rank in (0, 1):
        environment, arguments = slurm.told(rank)
        assert arguments == ["--run", "big one"]
        expected = {"NNODES": "2", "NODE_RANK": str(rank), "GPUS": "4", "MASTER_ADDR": "gpu07", "MASTER_PORT": "21007"}
        assert expected | {"DATA": "gs://b/shards", "GRACE_S": "150"} == {
            name: environment[name] for name in (*expected, "DATA", "GRACE_S")
        }
    assert (slurm.folder / "scontrol.txt").read_text() == "show hostnames gpu[07-08]\n"


@pytest.mark.parametrize("warned", [True, False], ids=["time is up", "a failure"])
def test_slurm_queues_again_what_ran_out_of_time_and_nothing_else(slurm, warned):
    slurm.command("srun", "exit 75")
    slurm.command("scancel", 'echo "$@" > scancel.txt; kill -TERM "$(cat srun.pid)"')
    if warned:
        slurm.command("srun", 'trap "exit 75" TERM; echo $$ > srun.pid; touch ready; while true; do sleep 0.05; done')
    with subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch")]) as batch:
        if warned:
            deadline = time.monotonic() + 120
            while not (slurm.folder / "ready").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            batch.send_signal(signal.SIGUSR1)
        assert batch.wait(120) == EXIT_STOPPED
    calls = (slurm.folder / "scontrol.txt").read_text()
    assert ("requeue 41007" in calls) == warned
    assert not warned or (slurm.folder / "scancel.txt").read_text() == "--signal=TERM 41007\n"


def test_slurm_is_asked_for_a_signal_that_leaves_time_to_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    notice = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert int(notice[1]) > int(re.search(r"GRACE_S:-(\d+)", text)[1])
    exported = set(re.search(r"^export (.*)$", text, re.MULTILINE)[1].split()) | {"NODE_RANK"}
    assert exported <= READ


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def job():
    service, job = yaml.safe_load_all((LAUNCH / "job.yaml").read_text())
    return service, job


def test_the_job_is_indexed_and_its_service_names_its_pods(job):
    service, job = job
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())  # Kubernetes takes no numbers here
    assert set(environment) <= READ
    assert environment["NNODES"] == str(spec["completions"])
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert environment["MASTER_PORT"] == str(service["spec"]["ports"][0]["port"])
    assert environment["GPUS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert int(environment["GRACE_S"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_job_ends_where_a_restart_mends_nothing_and_goes_on_where_it_was_stopped(job):
    spec = job[1]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # or the API refuses a podFailurePolicy
    name = spec["template"]["spec"]["containers"][0]["name"]
    by_codes = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore", "Count") and len(rule) == 2
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == name and codes["operator"] == "In"
            by_codes[rule["action"]] = codes["values"]
        else:
            assert all(set(condition) == {"type", "status"} for condition in rule["onPodConditions"])
    assert by_codes == {"FailJob": FINAL, "Ignore": [EXIT_STOPPED]}


def test_the_pods_command_is_the_same_command(job, machine, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    command = job[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert subprocess.run(command, cwd=machine.folder, timeout=120).returncode == 0
    environment, arguments = machine.told(1)
    assert environment["NODE_RANK"] == "1" and arguments == []


# ---- SkyPilot ----


def test_sky_pilot_tells_the_nodes_and_recovers(machine, monkeypatch):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task["resources"]["use_spot"] is True and task["resources"]["job_recovery"]["strategy"]
    assert set(task["envs"]) <= READ and all(isinstance(value, str) for value in task["envs"].values())
    given = {"NODE_RANK": "1", "NODE_IPS": "10.0.0.5\n10.0.0.6", "NUM_NODES": "2", "NUM_GPUS_PER_NODE": "8"}
    for name, value in given.items():
        monkeypatch.setenv(f"SKYPILOT_{name}", value)
    done = subprocess.run(["bash", "-c", task["run"]], cwd=machine.folder, timeout=120)
    assert done.returncode == 0
    environment, _ = machine.told(1)
    expected = {"NNODES": "2", "NODE_RANK": "1", "GPUS": "8", "MASTER_ADDR": "10.0.0.5"}
    assert {name: environment[name] for name in expected} == expected


# ---- Google Compute Engine ----


def test_the_start_up_script_makes_a_unit_of_the_instances_metadata(machine):
    metadata = f"REPOSITORY {machine.folder}\nDATA gs://b/my shards\nNNODES 1\nstartup-script #!/bin/bash\nRUN x\n"
    (machine.folder / "metadata").write_text(metadata)
    machine.command("curl", f'[[ "$*" = *"Metadata-Flavor: Google"* ]] && cat {machine.folder}/metadata')
    machine.command("systemd-run", f'printf "%s\\n" "$@" > {machine.folder}/unit')
    script = ["bash", str(LAUNCH / "gce_spot_startup.sh")]
    assert subprocess.run(script, timeout=120).returncode == 0
    words = (machine.folder / "unit").read_text().splitlines()
    assert words[-2:] == ["bash", "prod_train.sh"] and f"--working-directory={machine.folder}" in words
    given = {word.removeprefix("--setenv=") for word in words if word.startswith("--setenv=")}
    assert given == {"DATA=gs://b/my shards", "NNODES=1", "RUN=x", "GRACE_S=20", "MEET_S=1800"}
    assert f"--property=RestartPreventExitStatus={' '.join(map(str, FINAL))}" in words

    (machine.folder / "metadata").write_text("DATA gs://b\n")
    done = subprocess.run(script, timeout=120, capture_output=True, text=True)
    assert done.returncode == 2 and "REPOSITORY=''" in done.stderr and len(done.stderr.splitlines()) == 1
    machine.command("curl", "exit 7")
    assert subprocess.run(script, timeout=120).returncode == 7


def test_the_start_up_script_passes_on_what_prod_train_reads():
    text = (LAUNCH / "gce_spot_startup.sh").read_text()
    names = set(re.search(r"VARIABLES=\(([^)]*)\)", text)[1].split())
    assert names <= READ and READ - names <= {"HOSTFILE", "MIN_NODES", "MAX_NODES"}

"""Metrics in W&B, in its own offline store, read back by its own command line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from distill_nemo.runtime import metrics_file
from distill_nemo.training.wandb_run import AT_THE_END

SECRETS = {"WANDB_API_KEY": 4 * "0123456789", "HF_TOKEN": "hf_not_to_be_seen"}
ATTEMPT = """
import json, os, pathlib, signal, sys, time
import psutil
from distill_nemo.config import LoggingConfig
from distill_nemo.training.metrics import MetricsLog

directory, resumed, steps, killed = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
config = LoggingConfig(tensorboard=False, wandb_project="kd")
parameters = {"distillation": {"temperature": 2.5, "top_k": None}, "data": {"train": ["a", "b"]}}
log = MetricsLog(pathlib.Path(directory), config, 10, resumed, True, parameters)
for step in steps:
    log.train({"step": step, "lm_loss": 5.0 - step, "tokens": 64 * step, "tokens_per_second": 100.0}, show=False)
log.evaluation({"step": steps[-1], "lm_loss": float("nan"), "tokens": 7})
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
seen = {"connections": [str(c.laddr) for p in processes for c in p.net_connections("inet")]}
seen["processes"] = [p.pid for p in processes]
seen["finish_timeout"] = log._wandb.settings.finish_timeout
print(json.dumps(seen), flush=True)
if killed:
    time.sleep(0.5)  # W&B's files lack the seconds before a kill
    os.kill(os.getpid(), signal.SIGKILL)
log.close()
"""


def attempt(directory, resumed, steps, *killed, **environment):
    """Run one attempt at a run, in a process of its own. Return it."""
    directory.mkdir(exist_ok=True)
    ours = {"HOME": str(directory.parent), "WANDB_MODE": "offline", "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.1"}
    environment = {**os.environ, **SECRETS, **ours, **environment}
    command = [sys.executable, "-c", ATTEMPT, str(directory), str(resumed), json.dumps(steps), *killed]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def offline_runs(directory):
    """Return id, project, lines as (step, values), and name and config of each offline run, by W&B's own reader."""
    found = []
    for each in sorted(directory.glob("wandb/offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(each)]
        environment = {**os.environ, "WANDB_MODE": "offline"}
        shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        records = [json.loads(line) for line in shown.splitlines()]
        (run,) = (record["run"] for record in records if record["type"] == "run")
        history = [record["history"]["item"] for record in records if record["type"] == "history"]
        lines = [(line["_step"], {n: v for n, v in line.items() if not n.startswith("_")}) for line in history]
        configs = (record["config"]["update"] for record in records if record["type"] == "config")
        found.append((run["run_id"], run["project"], lines, (run["display_name"], *configs)))
    return found


@pytest.fixture(scope="module")
def without_server(tmp_path_factory):
    """Return the future of an attempt whose server is gone, which W&B takes ten seconds to see."""
    directory = tmp_path_factory.mktemp("without") / "run"
    with socket.socket() as closed, ThreadPoolExecutor() as pool:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        server = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        others = {"WANDB_INIT_TIMEOUT": "1", "WANDB_HTTP_TIMEOUT": "1", "WANDB_NAME": "named by its user"}
        yield pool.submit(lambda: (directory, attempt(directory, 0, [1, 2], **server, **others)))


@pytest.fixture(scope="module")
def story(tmp_path_factory, without_server):
    """Kill an attempt after its third step, resume at the second, copy the directory, and begin it anew."""
    root = tmp_path_factory.mktemp("wandb")
    attempts = [attempt(root / "a", 0, [1, 2, 3], "killed"), attempt(root / "a", 2, [3, 4])]
    first = offline_runs(root / "a")
    jsonl = metrics_file.read(root / "a" / "metrics.jsonl")
    content = b"".join(path.read_bytes() for path in (root / "a").rglob("*") if path.is_file())
    shutil.copytree(root / "a", root / "b", symlinks=True)
    shutil.rmtree(root / "b" / "wandb")
    shutil.rmtree(root / "a")
    attempts += [attempt(root / "b", 4, [5]), attempt(root / "a", 0, [1])]
    return attempts, first, [offline_runs(root / name)[0] for name in ("b", "a")], jsonl, content


def test_an_offline_run_has_the_lines_of_metrics_jsonl(story):
    attempts, (killed, resumed), _, jsonl, _ = story
    assert [each.returncode for each in attempts] == [-signal.SIGKILL, 0, 0, 0], attempts
    assert [step for step, _ in killed[2]] == [1, 2], "W&B writes a step once the next one begins"
    of_attempt = [line for line in jsonl if line["kind"] == "train"][2:]
    assert [step for step, _ in resumed[2]] == [line["step"] for line in of_attempt] == [3, 4]
    for (_, values), line in zip(resumed[2], of_attempt, strict=True):
        logged = {f"train/{name}": line[name] for name in ("lm_loss", "tokens", "tokens_per_second")}
        assert values == logged | ({"eval/tokens": 7} if line["step"] == 4 else {})


def test_a_resumed_run_goes_on_with_its_id_and_another_directory_has_another(story):
    _, (killed, resumed), (copied, anew), *_ = story
    assert killed[:2] == resumed[:2] and killed[1] == "kd"
    assert len({killed[0], copied[0], anew[0]}) == 3


def test_a_run_has_the_name_of_its_directory_and_its_config_in_every_attempt(story):
    _, (killed, resumed), (copied, _), *_ = story
    config = {"distillation": {"temperature": 2.5, "top_k": None}, "data": {"train": ["a", "b"]}}
    assert killed[3] == resumed[3] == ("a", config) and copied[3] == ("b", config)


def test_offline_nothing_listens_or_connects_stays_behind_or_tells_a_secret(story):
    attempts, *_, content = story
    for each in attempts:
        seen = json.loads(next(line for line in each.stdout.splitlines() if line.startswith('{"conn')))
        assert seen["connections"] == [] and len(seen["processes"]) > 1, "W&B's own process is seen"
        left = [process for process in psutil.process_iter() if process.pid in seen["processes"]]
        assert not psutil.wait_procs(left, timeout=20)[1]
    assert b"lm_loss" in content
    assert not [secret for secret in SECRETS.values() if secret.encode() in content]


def test_a_server_that_goes_away_is_waited_for_a_while_at_the_end(story):
    """W&B itself has no limit; that it keeps to its setting is its own matter."""
    seen = json.loads(next(line for line in story[0][1].stdout.splitlines() if line.startswith('{"conn')))
    assert seen["finish_timeout"] == AT_THE_END


def test_a_server_that_is_gone_leaves_an_offline_run(without_server):
    directory, ended = without_server.result()
    assert ended.returncode == 0, ended.stderr
    assert f"the run goes on, and `wandb sync {directory}/wandb/offline-run-*` sends its metrics later" in ended.stderr
    ((_, _, lines, (name, _)),) = offline_runs(directory)
    assert [step for step, _ in lines] == [1, 2] and name == "named by its user"


def test_without_a_key_a_run_is_refused(tmp_path):
    ended = attempt(tmp_path / "a", 0, [1], WANDB_MODE="online", WANDB_API_KEY="")
    assert ended.returncode == 1
    assert "ValueError: logging.wandb_project is set, but W&B refuses: " in ended.stderr
    assert "Export WANDB_API_KEY where the ranks run, or WANDB_MODE=offline" in ended.stderr

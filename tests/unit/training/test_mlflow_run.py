"""Metrics in MLflow, in its own store of files, read back by its own client."""

import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.tracking import MlflowClient

from distill_nemo.config import LoggingConfig
from distill_nemo.runtime import metrics_file
from distill_nemo.training import mlflow_run
from distill_nemo.training.metrics import MetricsLog

CONFIG = {"distillation": {"temperature": 2.0, "top_k": None}, "data": {"train": ["a", "b"]}, "output_dir": "x" * 900}


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MlflowClient(f"file:{tmp_path}/mlruns")


def attempt(directory, resumed, steps, parameters=CONFIG):
    directory.mkdir(exist_ok=True)
    config = LoggingConfig(tensorboard=False, mlflow_experiment="kd")
    log = MetricsLog(directory, config, 10, resumed, True, parameters)
    for step in steps:
        log.train({"step": step, "lm_loss": 5.0 - step + resumed / 100, "tokens_per_second": 100.0}, show=False)
    log.evaluation({"step": steps[-1], "lm_loss": float("nan"), "tokens": 7})
    log.close()


def runs(client):
    return client.search_runs([client.get_experiment_by_name("kd").experiment_id])


def history(client, run, key):
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, key)]


def test_mlflow_has_the_lines_of_every_attempt_and_no_step_twice(client, tmp_path):
    attempt(tmp_path / "run", 0, [1, 2, 3])
    (run,) = runs(client)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    expected = {"distillation.temperature": "2.0", "data.train": "['a', 'b']", "output_dir": "x" * 500}
    assert run.data.params == expected
    lines = [line for line in metrics_file.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert history(client, run, "train/lm_loss") == [(line["step"], line["lm_loss"]) for line in lines]
    assert history(client, run, "eval/tokens") == [(3, 7)] and "eval/lm_loss" not in run.data.metrics
    attempt(tmp_path / "run", 2, [3, 4], parameters={"optimizer": {"lr": 1.0}})  # killed after it had logged step 3
    (run,) = runs(client)
    assert run.data.params == expected
    assert history(client, run, "train/lm_loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.02)]
    assert [step for step, _ in history(client, run, "eval/tokens")] == [3, 4]


def test_a_step_of_which_half_was_sent_is_completed(client, tmp_path):
    attempt(tmp_path / "run", 0, [1, 2])
    (run,) = runs(client)
    client.log_metric(run.info.run_id, "train/lm_loss", 9.0, step=3)  # killed between two requests
    client.log_metric(run.info.run_id, "train/a", 1.0, step=1)  # not in every line
    attempt(tmp_path / "run", 2, [3, 4])
    assert history(client, run, "train/lm_loss") == [(1, 4.0), (2, 3.0), (3, 9.0), (4, 1.02)]
    assert [step for step, _ in history(client, run, "train/tokens_per_second")] == [1, 2, 3, 4]


def test_a_directory_that_is_new_or_a_copy_is_another_run(client, tmp_path):
    attempt(tmp_path / "a", 0, [1])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    attempt(tmp_path / "b", 1, [2])
    shutil.rmtree(tmp_path / "a")
    attempt(tmp_path / "a", 0, [1])
    assert sorted(run.info.run_name for run in runs(client)) == ["a", "a", "b"]


def test_what_a_store_refuses_is_sent_again_and_the_run_goes_on(client, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(mlflow_run, "PAUSE", 0.01)
    refused = iter([True] * 3)
    log_batch = MlflowClient.log_batch

    def refusing(self, *args, **kwargs):
        if next(refused, False):
            raise OSError("no route to host")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", refusing)
    attempt(tmp_path / "run", 0, [1, 2, 3])
    (run,) = runs(client)
    assert [step for step, _ in history(client, run, "train/lm_loss")] == [1, 2, 3]
    assert capfd.readouterr().err.count("warning: MLflow: no route to host; the run goes on") == 1


def test_a_server_that_does_not_answer_holds_nobody_up(tmp_path, monkeypatch, capfd):
    asked, ended = threading.Event(), threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            ended.wait(60)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(mlflow_run, "AT_THE_END", 0.1)
    attempt(tmp_path / "run", 0, [1, 2])
    assert asked.wait(60)
    assert "values were not sent; all are in metrics.jsonl" in capfd.readouterr().err
    assert len(metrics_file.read(tmp_path / "run" / "metrics.jsonl")) == 3
    ended.set()
    server.shutdown()
    server.server_close()


def test_without_a_server_or_mlflow_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI is not: export the server's address"):
        attempt(tmp_path / "run", 0, [1])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=r"pip install distill-nemo\[mlflow\]"):
        attempt(tmp_path / "run", 0, [1])

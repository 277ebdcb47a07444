"""A run's metrics in MLflow, sent by a thread: a server that is slow or gone neither delays nor ends the run."""

import os
import sys
import threading
import time
from collections.abc import Mapping
from itertools import batched
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Metric

MAX_METRICS, MAX_PARAMETERS, MAX_CHARACTERS = 1000, 100, 500  # of a request, and of a parameter's value
TAG = "distill_nemo.run"
PAUSE = 10.0  # seconds after a failure
AT_THE_END = 30.0  # seconds to send what is left


class MlflowRun:
    """One MLflow run for all attempts at a run.

    A resumed run leaves out the steps that an earlier attempt has sent, since MLflow cannot replace them.

    Args:
        experiment: is made if there is none of this name.
        name: of the run.
        identifier: of the run, the same for every attempt.
        parameters: nested; recorded when the run is made.

    Raises:
        ValueError: if MLflow is not installed, or the environment names no server.
    """

    def __init__(self, experiment: str, name: str, identifier: str, parameters: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it reports to Databricks
        try:
            import mlflow  # noqa: F401
        except ImportError:
            raise ValueError(
                "logging.mlflow_experiment is set, but MLflow is missing: pip install distill-nemo[mlflow]"
            ) from None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError(
                "logging.mlflow_experiment is set, but MLFLOW_TRACKING_URI is not: export the server's address, such "
                "as http://mlflow:5000"
            )
        self._experiment, self._name, self._identifier, self._parameters = experiment, name, identifier, parameters
        self._waiting: list[Metric] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """Send the numbers of a line of `metrics.jsonl`, without waiting for it."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._changed:
            self._waiting += [Metric(f"{kind}/{name}", float(value), now, step) for name, value in numbers.items()]
            self._changed.notify()

    def close(self) -> None:
        """Send what is left, for at most `AT_THE_END` seconds, and mark the run as finished."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(AT_THE_END)
        if self._thread.is_alive():
            _warn(f"{len(self._waiting):,} values were not sent; all are in metrics.jsonl")

    def _send_all(self) -> None:
        sent: _SentRun | None = None
        failed = False
        while True:
            with self._changed:
                if failed:
                    self._changed.wait(PAUSE)
                self._changed.wait_for(lambda: self._waiting or self._closed)
                metrics, last = self._waiting[:MAX_METRICS], self._closed and len(self._waiting) <= MAX_METRICS
            try:
                sent = sent or _SentRun(self._experiment, self._name, self._identifier, self._parameters)
                sent.send(metrics, last)
            except Exception as error:  # of any tracking store
                if not failed:
                    _warn(f"{error}; the run goes on, and sends again later")
                failed = True
                continue
            failed = False
            with self._changed:
                del self._waiting[: len(metrics)]
            if last:
                return


class _SentRun:
    """The run on the server, found by its tag or made."""

    def __init__(self, experiment: str, name: str, identifier: str, parameters: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        known = self.client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self.client.create_experiment(experiment)
        found = self.client.search_runs([place], f"tags.`{TAG}` = '{identifier}'", max_results=1)
        run = found[0] if found else self.client.create_run(place, run_name=name, tags={TAG: identifier})
        self.id = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        self._steps: dict[str, int | None] = dict.fromkeys(run.data.metrics)  # last ones of metrics, once asked for
        if not run.data.params:
            self._log_parameters(parameters)

    def send(self, metrics: list["Metric"], last: bool) -> None:
        """Send the metrics that no earlier attempt has sent; after the last ones, mark the run as finished."""
        new = [metric for metric in metrics if metric.step > self._last_step(metric.key)]
        if new:
            self.client.log_batch(self.id, new)
        if last:
            self.client.set_terminated(self.id)

    def _last_step(self, key: str) -> int:
        """Return the last step that earlier attempts have sent of a metric, since a kill may split a step; or -1."""
        step = self._steps.setdefault(key, -1)
        if step is None:
            step = self._steps[key] = max(each.step for each in self.client.get_metric_history(self.id, key))
        return step

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(name, value[:MAX_CHARACTERS]) for name, value in _flat(parameters).items()]
        for some in batched(flat, MAX_PARAMETERS):
            self.client.log_batch(self.id, params=some)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return values that are set, as text by dotted name."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _warn(message: str) -> None:
    print(f"warning: MLflow: {message}", file=sys.stderr, flush=True)

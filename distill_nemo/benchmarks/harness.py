"""lm-evaluation-harness on a Hugging Face directory, run by all ranks. Imports lm_eval and torch.

To the harness there is one process: every rank builds all prompts, and computes the metrics from all answers. Only the
model's work is divided. The harness's own data parallelism needs GPUs, draws other examples for prompts on each rank,
and orders the answers otherwise.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets.exceptions import DatasetsError
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import evaluator, utils
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from distill_nemo.job_config import EvaluateConfig
from distill_nemo.runtime.process_groups import of_all_ranks, rank, world_size

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


BOOTSTRAPS = 100_000  # resamples for standard errors, the harness's default
KEPT = ("results", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


class SharedModel(HFLM):
    """Causal language model of which each rank has a copy, on its own GPU if there are GPUs.

    Args:
        directory: Hugging Face directory with safetensors. No code in it is run.
        config: has dtype and batch size.
        tokenizer: directory; None for the model's own.
    """

    def __init__(self, directory: Path, config: EvaluateConfig, tokenizer: str | None) -> None:
        given = {name: vars(config)[name] for name in ("dtype", "batch_size", "parallelize")}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        safe = {"trust_remote_code": False, "use_safetensors": True}
        super().__init__(**{"pretrained": str(directory), "tokenizer": tokenizer, "device": device, **safe, **given})
        self._rank, self._world_size = 0, 1

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and True if it is the most likely one."""
        return divided(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text."""
        return divided(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt."""
        return divided(requests, super().generate_until)


def divided[A](requests: "list[Instance]", answer: "Callable[[list[Instance]], list[A]]") -> list[A]:
    """Return the answers to all requests, each from one rank. Collective: every rank must call it.

    Requests of one prompt stay together, since the harness answers them by one pass. Long and short prompts alternate
    between the ranks.
    """
    if world_size() == 1:
        return answer(requests)
    prompts = sorted(dict.fromkeys(request.args[0] for request in requests), key=len, reverse=True)
    own = set(prompts[rank() :: world_size()])
    places = [place for place, request in enumerate(requests) if request.args[0] in own]
    found = answer([requests[place] for place in places]) if places else []
    answers = {place: each for share in of_all_ranks(list(zip(places, found, strict=True))) for place, each in share}
    return [answers[place] for place in range(len(requests))]


@contextlib.contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Render the templates of tasks in Jinja's sandbox. The harness would let them reach all of Python."""
    plain = utils.env
    utils.env = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    utils.env.filters.update(plain.filters)
    try:
        yield
    finally:
        utils.env = plain


@contextlib.contextmanager
def nothing_about_this_machine() -> Iterator[None]:
    """Keep the harness from asking git, which complains outside a repository, and for four seconds the packages."""
    about = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash, evaluator.add_env_info = (lambda: None), (lambda results: None)
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = about


def task_manager(tasks: list[str], config: EvaluateConfig, directory: Path) -> TaskManager:
    """Return the harness's index of tasks. Its own ones, whose files take seconds to read, only if they are needed.

    Raises:
        ValueError: for an unknown task, with close matches.
    """
    about: dict[str, dict[str, Any] | str] = {
        "pretrained": str(directory),
        "dtype": config.dtype,
    }  # as its command line does; some tasks want them
    if config.include_path:
        of_user = TaskManager(include_path=config.include_path, include_defaults=False, metadata=about)
        if set(tasks) <= {*of_user.all_subtasks, *of_user.all_tags}:
            return of_user
    found = TaskManager(include_path=config.include_path, metadata=about)
    for task in tasks:
        if task not in found.all_tasks:
            near = difflib.get_close_matches(task, found.all_tasks, n=3, cutoff=0.6)
            meant = f"Did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
            raise ValueError(f'tasks: "{task}" is not known. {meant}')
    return found


def results_of(model: SharedModel, task: str, tasks: TaskManager, config: EvaluateConfig) -> dict[str, Any]:
    """Return the harness's results of a task or group on rank 0, else nothing. Collective: every rank must call it.

    Raises:
        ValueError: for a data set or package that cannot be had, a template that reaches beyond its data, or a task
            that the harness cannot use.
    """
    try:
        with contextlib.nullcontext() if config.allow_code else sandboxed_templates(), nothing_about_this_machine():
            found = evaluator.simple_evaluate(
                model,
                tasks=[task],
                task_manager=tasks,
                num_fewshot=config.num_fewshot,
                batch_size=config.batch_size,
                limit=config.limit,
                apply_chat_template=config.apply_chat_template,
                bootstrap_iters=BOOTSTRAPS if rank() == 0 else 0,
                log_samples=False,
                confirm_run_unsafe_code=config.allow_code,
            )
    except SecurityError as error:
        raise ValueError(
            f"tasks: a template of {task} reaches beyond its data: {error}; allow_code=true, if you trust it"
        ) from None
    except (OSError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(
            f"tasks: the data of {task} cannot be had: {reason}. Without a network, fill the cache of the Hugging Face "
            "hub (HF_HOME) on a machine that has one, or name files in a task of include_path"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"tasks: {task} needs a package: {error}. lm-evaluation-harness has extras for its tasks, such as "
            "pip install 'lm-eval[ifeval]'"
        ) from error
    except (TemplateError, LookupError, TypeError, ValueError) as error:  # the harness does not check its YAML files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"tasks: lm-evaluation-harness cannot measure {task}: {reason}. Correct its YAML file, or num_fewshot"
        ) from error
    return {name: value for name, value in (found or {}).items() if name in KEPT}

"""Imports for the processes of `tests.spawn`, which take nine seconds once for all of them."""

import gc
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the device is chosen, which the forked processes inherit

from distill_nemo.training.entry import import_modules

import_modules()

import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.qwen2.modeling_qwen2  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401, E402

import distill_nemo.evaluation  # noqa: E402
import distill_nemo.models.checkpoints.huggingface  # noqa: F401, E402

gc.freeze()  # or each collection of a forked process would take 0.2 s over modules, half the time of a tiny run

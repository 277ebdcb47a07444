"""Imports for the processes of `tests.spawn`, which take nine seconds once for all of them."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the device is chosen, which the forked processes inherit

from distill_nemo.runtime.imports import megatron_imports

with megatron_imports():
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3.modeling_qwen3
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import distill_nemo.evaluation
    import distill_nemo.models.checkpoints.huggingface  # noqa: F401
    from distill_nemo.training.entry import import_modules

    import_modules()

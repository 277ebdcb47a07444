"""Imports for the processes of `tests.spawn`, which take nine seconds once for all of them."""

import gc

from distill_nemo.runtime.device import setup_device

setup_device()  # before Megatron is imported

import megatron.core.dist_checkpointing.strategies.state_dict_saver  # noqa: F401, E402
import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.qwen2.modeling_qwen2  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401, E402

import distill_nemo.checkpoint.export  # noqa: E402
import distill_nemo.evaluation  # noqa: E402
import distill_nemo.models.checkpoints.huggingface  # noqa: E402
import distill_nemo.models.source_check  # noqa: E402
import distill_nemo.training.calibration  # noqa: E402
import distill_nemo.training.data  # noqa: E402
import distill_nemo.training.loop  # noqa: E402
import distill_nemo.training.setup  # noqa: E402
import distill_nemo.training.stores  # noqa: F401, E402

gc.collect()
gc.freeze()  # or each collection of a forked process would take 0.2 s over these modules, half the time of a tiny run

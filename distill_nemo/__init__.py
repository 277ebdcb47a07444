"""Distil large language models on Megatron-Core: configs in Fiddle, launches by NeMo-Run, distillation by ModelOpt."""

__version__ = "0.1.0"

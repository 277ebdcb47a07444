"""Weights as ModelOpt's importer reads and its exporter writes them: an oracle for the families that it supports."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

from modelopt.torch.export.plugins.megatron_importer import GPTModelImporter
from modelopt.torch.export.unified_export_megatron import GPTModelExporter

VOCAB_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


class Importer(GPTModelImporter):
    """ModelOpt's importer, with the vocabulary padded by rows of zeros like Megatron's."""

    def __init__(self, built, path):
        super().__init__(built, str(path), dtype=next(built.parameters()).dtype)
        self.disable_tqdm = True

    def _get_safetensor(self, key, parallel_config=None):
        if key not in VOCAB_TENSORS:
            return super()._get_safetensor(key, parallel_config)
        from megatron.core import parallel_state

        rows = super()._get_safetensor(key, None)
        padded = rows.new_zeros(-(-len(rows) // 128) * 128, rows.shape[1])
        padded[: len(rows)] = rows
        size = parallel_state.get_tensor_model_parallel_world_size()
        return padded.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]


def fill_by_modelopt(built, path):
    """Fill this rank's part of `built` from a Hugging Face directory."""
    Importer(built, path)._import_state_dict()


def tensors_by_modelopt(built, path, vocab_size):
    """Return the tensors of an export of `built`, which is the whole model of the directory."""
    config = json.loads(Path(path, "config.json").read_text())
    with tempfile.TemporaryDirectory() as stated, contextlib.redirect_stdout(io.StringIO()):
        Path(stated, "config.json").write_text(json.dumps(config))
        exporter = GPTModelExporter(built, stated, dtype=next(built.parameters()).dtype)
    merged = {name: t for part in exporter.layer_state_dicts.values() for name, t in part.items()}
    return {name: t[:vocab_size] if name in VOCAB_TENSORS else t for name, t in merged.items()}

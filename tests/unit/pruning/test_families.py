"""A cut of every family against transformers, with tensors sliced here by plain indexing."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from distill_nemo.config import PruneConfig, StudentConfig
from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.tiny_models import FAMILIES, write_hf
from tests.token_files import write_tokens

SIZES = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "moe_ffn_hidden_size": 32,
    "mamba_num_heads": 4,
}
WIDE_QK_NORMS = ("olmo2", "olmo3", "olmoe")
HEADS = {"q_proj": ("q", "h"), "k_proj": ("k", "h"), "v_proj": ("k", "h"), "o_proj": ("h", "q"), "sinks": ("q",)}
LATENT = {
    **{"q_proj": ("q", "h"), "q_b_proj": ("q", ""), "kv_b_proj": ("q", ""), "o_proj": ("h", "q")},
    **{"q_a_proj": ("", "h"), "kv_a_proj_with_mqa": ("", "h")},
}
MLP = {"gate_proj": ("f", "h"), "up_proj": ("f", "h"), "down_proj": ("h", "f"), "output_linear": ("h", "f")}
OTHERS = {  # delta nets keep their own sizes
    **{"in_proj_qkv": ("", "h"), "in_proj_z": ("", "h"), "in_proj_a": ("", "h"), "in_proj_b": ("", "h")},
    **{"in_proj_qkvz": ("", "h"), "in_proj_ba": ("", "h"), "out_proj": ("h", "")},
}


class Slicer:
    """Indices of what stays, and the slicing of one model's tensors by their names."""

    def __init__(self, family, config, kept):
        self.family, self.kept, self.d = family, kept, config.get("head_dim") or 16
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.ffn = config["intermediate_size"]

    def model(self, tensors):
        """Return the tensors of the result."""
        new = {}
        for name, tensor in tensors.items():
            match = re.match(r"(model|backbone)\.layers\.(\d+)\.(.+)", name)
            if match is None:
                new[name] = tensor[:, self.kept.hidden] if tensor.dim() == 2 else tensor[self.kept.hidden]
            elif int(match[2]) in self.kept.layers:
                layer = int(match[2])
                inside, sliced = self.in_layer(match[3], tensor, layer)
                if inside is not None:
                    new[f"{match[1]}.layers.{self.kept.layers.index(layer)}.{inside}"] = sliced
        return new

    def in_layer(self, name, tensor, layer):
        """Return name and slice of a tensor of a layer; None for an expert that is left out."""
        kept = self.kept
        expert = re.search(r"experts\.(\d+)\.", name)
        if expert and "shared" not in name:
            number = int(expert[1])
            if number not in kept.experts[layer]:
                return None, None
            place = kept.experts[layer].index(number)
            dims = {**MLP, "w1": ("f", "h"), "w3": ("f", "h"), "w2": ("h", "f")}[name.split(".")[-2]]
            sliced = self.by(tensor, dims, {"f": kept.expert_ffn[layer][number]})
            return name.replace(expert[0], f"experts.{place}."), sliced
        if self.family == "gpt_oss" and "mlp.experts" in name:
            return name, self.stacked(name, tensor, layer)
        if "block_sparse_moe.input_linear" in name or "block_sparse_moe.output_linear" in name:
            return name, self.one_after_another(name, tensor, layer)
        return name, self.plain(name, tensor, layer)

    def stacked(self, name, tensor, layer):
        parts = []
        for expert in self.kept.experts[layer]:
            channels, one = self.kept.expert_ffn[layer][expert], tensor[expert]
            if "gate_up" in name:
                both = [2 * c + half for c in channels for half in (0, 1)]
                parts.append(one[self.kept.hidden][:, both] if one.dim() == 2 else one[both])
            else:
                parts.append(one[channels][:, self.kept.hidden] if one.dim() == 2 else one[self.kept.hidden])
        return torch.stack(parts)

    def one_after_another(self, name, tensor, layer):
        parts = []
        for expert in self.kept.experts[layer]:
            channels, one = self.kept.expert_ffn[layer][expert], tensor[expert]
            if "input" in name:
                gate, up = one.chunk(2)
                parts.append(torch.cat([gate[channels], up[channels]])[:, self.kept.hidden])
            else:
                parts.append(one[self.kept.hidden][:, channels])
        return torch.stack(parts)

    def plain(self, name, tensor, layer):
        part, kept = name.split(".")[-2], self.kept
        if layer in kept.mamba and name.startswith("mixer."):
            return self.mamba(name, tensor, layer)
        if name.endswith(("sinks", "A_log", "dt_bias")) or part in ("conv1d", "q_a_layernorm", "kv_a_layernorm"):
            return tensor[kept.heads[layer]] if name.endswith("sinks") else tensor
        if name.endswith("e_score_correction_bias"):
            return tensor[kept.experts[layer]]
        if re.search(r"(mlp\.gate|mlp\.router|block_sparse_moe\.(gate|router\.layer)|mixer\.gate)\.", name):
            return self.by(tensor, ("e", "h"), {"e": kept.experts[layer]})
        if part == "shared_expert_gate":
            return tensor[:, kept.hidden]
        if "linear_attn.norm" in name:
            return tensor
        if part in ("q_norm", "k_norm"):
            return self.by(tensor, ("q" if part == "q_norm" else "k",), self.of(layer)) if self.wide else tensor
        if "norm" in part:
            return tensor[kept.hidden]
        if part == "qkv_proj":
            queries, keys, values = tensor.split([self.heads * self.d, self.groups * self.d, self.groups * self.d])
            rows = [("q", queries), ("k", keys), ("k", values)]
            return torch.cat([self.by(each, (kind, "h"), self.of(layer)) for kind, each in rows])
        if part in ("gate_up_proj", "input_linear"):
            return torch.cat([self.by(each, ("f", "h"), self.of(layer)) for each in tensor.chunk(2)])
        if "shared_expert" in name:
            return self.by(tensor, MLP[part], {"f": kept.shared_ffn[layer]})
        latent = any("kv_b_proj" in each for each in self.names)
        table = {**HEADS, **MLP, **OTHERS, **(LATENT if latent and "self_attn" in name else {})}
        return self.by(tensor, table[part][: tensor.dim()], self.of(layer))

    def mamba(self, name, tensor, layer):
        """Cut 8 heads of 12 channels, beside which are 4 groups of 16 states for each of B and C."""
        heads = torch.tensor(self.kept.mamba[layer])
        channels, states = (heads[:, None] * 12 + torch.arange(12)).flatten(), torch.arange(2 * 4 * 16)
        if "in_proj" in name:  # z, x, B, C, dt
            rows = torch.cat([channels, 96 + channels, 192 + states, 320 + heads])
            return tensor[rows][:, self.kept.hidden]
        if "conv1d" in name:
            return tensor[torch.cat([channels, 96 + states])]
        if "out_proj" in name:
            return tensor[self.kept.hidden][:, channels]
        return tensor[channels if "norm" in name else heads]

    @property
    def wide(self):
        return self.family in WIDE_QK_NORMS

    def of(self, layer):
        return {"q": ("heads", layer), "k": ("groups", layer), "f": self.kept.ffn.get(layer)}

    def by(self, tensor, dims, which):
        """Index each dimension by what its letter stands for."""
        for axis, letter in enumerate(dims[: tensor.dim()]):
            indices = self.kept.hidden if letter == "h" else which.get(letter)
            if isinstance(indices, tuple):
                numbers = getattr(self.kept, indices[0])[indices[1]]
                each = tensor.shape[axis] // (self.heads if indices[0] == "heads" else self.groups)
                indices = [number * each + i for number in numbers for i in range(each)]
            if indices is not None:
                tensor = tensor.index_select(axis, torch.tensor(indices))
        return tensor


def fewer_experts(count, family):
    return count if family == "deepseek_v3" else count - 2  # its groups of two would be too small


def hidden_size(family):
    return 32 if family in ("phi3", "olmoe") else 48  # in their classes a head has hidden_size / heads channels


def expected_config(config, family, kept):
    """Return the source's config.json with sizes changed by their names in it."""
    new, count = dict(config), 4
    new |= {"num_hidden_layers": 3, "hidden_size": hidden_size(family), "num_attention_heads": 2}
    new["num_key_value_heads"] = 2 if "kv_lora_rank" in config else 1
    new["intermediate_size"] = 32 if family in ("granitemoe", "mixtral", "olmoe", "gpt_oss") else 64
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(name):
            new[name] = fewer_experts(config[name], family)
    if config.get("shared_intermediate_size"):
        new |= {"shared_intermediate_size": 64, "mamba_d_head": "auto"}
    if config.get("moe_intermediate_size"):
        new["moe_intermediate_size"] = 32
    if config.get("head_dim") is None and "kv_lora_rank" not in config:
        new["head_dim"] = 16
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type"):
        if isinstance(config.get(name), list) and len(config[name]) == count:
            new[name] = [config[name][i] for i in kept.layers]
    if "mamba_num_heads" in config:
        new["mamba_num_heads"] = 4
    if config.get("hybrid_override_pattern"):
        new["hybrid_override_pattern"] = "".join(config["hybrid_override_pattern"][i] for i in kept.layers)
    if config.get("mlp_only_layers"):
        new["mlp_only_layers"] = [kept.layers.index(i) for i in config["mlp_only_layers"] if i in kept.layers]
    if config.get("decoder_sparse_step", 1) > 1:
        dense = [kept.layers.index(i) for i in kept.layers if (i + 1) % config["decoder_sparse_step"]]
        new |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if config.get("first_k_dense_replace"):
        new["first_k_dense_replace"] = sum(i < config["first_k_dense_replace"] for i in kept.layers)
    return new


def cut_by_package(path, output, family):
    """Score, choose and write as `prune` does. Return what was kept."""
    from distill_nemo.models.checkpoints.export_files import export_files
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.pruning.choice import choose, kept_layers
    from distill_nemo.pruning.importance import watching
    from distill_nemo.pruning.sizes import complete, sizes_of, smaller, with_source
    from distill_nemo.pruning.tensors import CutTensors, write_cut
    from distill_nemo.runtime.everyone import Everyone

    with process_groups(Layout().config()):
        model = resolve(StudentConfig(checkpoint=path))
        own = sizes_of(model)
        given = {name: size for name, size in SIZES.items() if name in own} | {"hidden_size": hidden_size(family)}
        if model.experts:
            given["num_experts"] = fewer_experts(own["num_experts"], family)
        sizes = complete(model, given)
        built = model_provider(student=model, parallelism=Layout().config()).eval()
        tokens = torch.randint(model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), watching(built, model) as sums:
            built(tokens, torch.arange(24).expand(2, -1), None)
        scores = sums.gathered()
        cut = smaller(model, sizes, kept_layers(scores, sizes["num_layers"]))
        kept = choose(scores, model, cut, sizes)
        Path(output).mkdir()
        with CutTensors(model, cut, kept) as tensors:
            write_cut(tensors, Path(output), Everyone())
        export_files(with_source(model, cut, kept.layers), torch.float32, Path(path), None).write(Path(output))
        return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_cut_are_those_of_a_model_sliced_by_plain_indexing(tmp_path, family):
    setup_device()
    path = write_hf(tmp_path / "source", family)
    kept = cut_by_package(path, tmp_path / "cut", family)
    config, tensors = json.loads(Path(path, "config.json").read_text()), load_file(f"{path}/model.safetensors")
    slicer = Slicer(family, config, kept)
    slicer.names = list(tensors)
    (tmp_path / "sliced").mkdir()
    (tmp_path / "sliced/config.json").write_text(json.dumps(expected_config(config, family, kept)))
    sliced = {name: tensor.contiguous() for name, tensor in slicer.model(tensors).items()}
    save_file(sliced, tmp_path / "sliced/model.safetensors", {"format": "pt"})
    tokens = torch.randint(507, (2, 24), generator=torch.Generator().manual_seed(4))

    def logits(directory):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").float().eval()
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    expected, found = logits(tmp_path / "sliced"), logits(tmp_path / "cut")
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert found.shape[-1] == 507 and len(kept.layers) == 3 and len(kept.hidden) == hidden_size(family)


def test_a_tokenizer_that_cannot_be_opened_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    setup_device()
    from distill_nemo.pruning.prune import prune

    path = write_hf(tmp_path / "source", "llama")
    train_tokenizer(stdlib_modules()[:1], tmp_path / "source", 300)
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"pad_token": ["a"]}')
    data = write_tokens(tmp_path / "data", 0)
    monkeypatch.setattr("distill_nemo.pruning.prune.process_groups", pytest.fail)
    with pytest.raises(ValueError, match=r"cannot open the tokenizer in .*source: .*; repair it$"):
        prune(PruneConfig(path, str(tmp_path / "out"), data, num_layers=3, sequence_length=8, samples=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["source", "link", "."])
def test_an_output_that_holds_its_model_is_refused_before_the_model_is_lost(tmp_path, monkeypatch, output):
    """An export of ours may otherwise be replaced, and a result of `prune` is one."""
    setup_device()
    from distill_nemo.pruning.prune import prune

    path = write_hf(tmp_path / "source", "llama")
    (tmp_path / "link").symlink_to(path)
    monkeypatch.setattr("distill_nemo.pruning.prune.process_groups", pytest.fail)
    with pytest.raises(ValueError, match=r"would be replaced, and .*source is read from it: name another directory"):
        prune(PruneConfig(path, str(tmp_path / output), str(tmp_path / "data"), num_layers=3))

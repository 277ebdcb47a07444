"""`nemo distill prepare`, `export` and `evaluate`, and the metrics that they print."""

import json
import re

import numpy as np
import pytest
import torch
import transformers

from tests.cli.command import TWO_RANKS, nemo, nemo_forked, together

STAGES = ["parallelism.pipeline_model_parallel_size=2"]
THREE = ["parallelism.tensor_model_parallel_size=3"]
RUN = "runs/llama32_3b_to_1b"


@pytest.fixture(scope="module")
def tools(inputs, finished, one, tmp_path_factory):
    """Return, by name, the results of each command. Text for `prepare` lies beside its output.

    What starts processes runs as a user starts it, two at a time; the rest in a process that has imported torch.
    """
    ran_in, _ = finished
    cwd = tmp_path_factory.mktemp("tools")
    (cwd / "text").mkdir()
    (cwd / "text" / "a.txt").write_text("def f(x):\n    return x\n")
    (cwd / "text" / "b.jsonl").write_text('{"text": "import re"}\n{"text": 3}\n{"text": "x = 1"}\n')
    held_out = ["evaluate", f"data={inputs}/valid", "sequence_length=32", "samples=8"]
    teacher, more_rows = f"teacher={inputs}/teacher", ["teacher=teacher", "vocab_size=507"]
    prepare = ["prepare", "inputs=text", "output=out/corpus", f"tokenizer={inputs}/tokenizer", "max_bad_records=1"]
    run = f"{ran_in}/{RUN}"
    export = "export", f"checkpoint={run}/checkpoints/step_00000012"
    calls = {
        "as trained": lambda: nemo(*export, "output=as_trained", *TWO_RANKS, cwd=cwd),
        "in stages": lambda: nemo(*export, "output=in_stages", *STAGES, *TWO_RANKS, cwd=cwd),
        "prepare": lambda: nemo(*prepare, cwd=cwd),
    }
    ended = dict(zip(calls, together(*calls.values()), strict=True))
    padded(f"{inputs}/teacher", cwd / "teacher")
    quick = {
        "export": [*export, "output=exported"],
        "three": [*export, "output=three", *THREE, *TWO_RANKS],
        "prepare again": prepare,
        "of ours": [*held_out, f"model={run}", teacher],
        "of Hugging Face's": [*held_out, f"model={run}/student", teacher],
        "with more rows": [*held_out, f"model={run}", *more_rows],
        "of domains": [*held_out, f"model={run}/student", f"data={inputs}/valid,{inputs}/train", "output=scores"],
    }
    return cwd, ended | {name: nemo_forked(one, *arguments, cwd=cwd) for name, arguments in quick.items()}


def padded(source, target):
    """Write a copy with 93 more rows of the vocabulary, which would change every probability."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(600, mean_resizing=False)
    torch.nn.init.ones_(model.lm_head.weight.data[507:])
    model.save_pretrained(target)


def test_export_writes_any_saved_step(finished, tools):
    cwd, ended = tools
    assert (ended["export"].code, ended["export"].err) == (0, "")
    assert ended["export"].out == "exported step_00000012 to exported: the reloaded model gives the same logits\n"
    earlier = transformers.AutoModelForCausalLM.from_pretrained(cwd / "exported").state_dict()
    last = transformers.AutoModelForCausalLM.from_pretrained(finished[0] / RUN / "student").state_dict()
    assert earlier.keys() == last.keys()
    assert not torch.equal(earlier["lm_head.weight"], last["lm_head.weight"])


def test_ranks_of_an_executor_export_the_same_as_one_process(tools):
    cwd, ended = tools
    expected = transformers.AutoModelForCausalLM.from_pretrained(cwd / "exported").state_dict()
    for name in ("as_trained", "in_stages"):
        result = ended[name.replace("_", " ")]
        assert (result.code, result.err) == (0, "")
        assert f"exported step_00000012 to {name}: the reloaded model gives the same logits" in result.out
        found = transformers.AutoModelForCausalLM.from_pretrained(cwd / name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(list((cwd / "as_trained").glob("*.safetensors"))) == 1, "the run was tensor parallel"
    assert len(list((cwd / "in_stages").glob("*.safetensors"))) == 2
    three = ended["three"]
    assert three.code == 1 and three.err.startswith("error: world size 2 is not divisible by tensor x pipeline x ")


def test_evaluate_gives_the_same_figures_for_a_run_and_for_its_export(inputs, tools):
    ours, exported = tools[1]["of ours"], tools[1]["of Hugging Face's"]
    assert (ours.code, ours.err, exported.code, exported.err) == (0, "", 0, "")
    assert ours.out == exported.out == tools[1]["with more rows"].out
    metrics = dict(line.split() for line in ours.out.splitlines())
    assert metrics.keys() == {"lm_loss", "forward_kl", "top1_agreement", "teacher_entropy", "teacher_lm_loss", "tokens"}
    assert metrics["tokens"] == "256"
    assert 0.2 < float(metrics["forward_kl"]) < 0.8, "0.47 at the start"
    assert abs(float(metrics["lm_loss"]) - np.log(507)) < 0.5, "about uniform"


def test_each_domain_is_measured_apart(tools):
    cwd, ended = tools
    result = ended["of domains"]
    assert (result.code, result.err) == (0, "")
    rows = json.loads((cwd / "scores" / "scores.json").read_text())["held_out"]
    assert [row["model"] for row in rows] == ["model, valid", "model, train"]
    assert all(re.search(rf"^ *{row['model']} .* {row['lm_loss']:.3f} ", result.out, re.M) for row in rows)
    alone = dict(line.split() for line in ended["of Hugging Face's"].out.splitlines())
    assert f"{rows[0]['lm_loss']:.4f}" == alone["lm_loss"] != f"{rows[1]['lm_loss']:.4f}"


def test_prepare_tells_documents_tokens_and_bad_records(inputs, tools):
    cwd, ended = tools
    first, second = ended["prepare"], ended["prepare again"]
    assert (first.code, second.code, second.err) == (0, 0, "")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "tokenizer")
    texts = ["def f(x):\n    return x\n", "import re", "x = 1"]
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert np.fromfile(cwd / "out" / "corpus.bin", dtype=np.uint16).tolist() == ids
    assert re.search(rf"^out/corpus.bin: 3 documents, {len(ids)} tokens, [\d,]+ tokens/s, [\d.]+ s$", first.out, re.M)
    assert "skipped 1 bad record (max_bad_records = 1):\n  text/b.jsonl:2 " in first.out
    found = 'format: text (whole files, or the key "text")'
    assert second.out == f"{found}\nout/corpus.bin is complete: 3 documents, {len(ids)} tokens; nothing to do\n"
    assert json.loads((cwd / "out" / "corpus.json").read_text())["bad_records"] == 1

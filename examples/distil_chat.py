"""Distil a chat model: only the answers count, and a teacher makes them better at equal tokens.

Conversations are made from the docstrings of Python's standard library. A teacher learns all but a twentieth of them,
which is held out. Two students of the same weights then train on a tenth, one with the teacher and one without. Takes
100 seconds of processor time and no GPU. Replace CHATS by your own files: `nemo distill prepare` reads most formats.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import nemo_run as run
from transformers import PreTrainedTokenizerFast

from distill_nemo.data.prepare import prepare
from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer
from distill_nemo.executors import local
from recipes import quickstart, quickstart_alone, quickstart_teacher

ROOT = Path("runs/distil_chat")
CHATS = ROOT / "chats"
TOKENIZER = ROOT / "tokenizer"
TEMPLATE = """\
{%- for message in messages -%}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


def conversations() -> Iterator[dict]:
    """Yield a question and its answer for every function of the standard library that has a docstring."""
    for path in stdlib_modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                question = f"What does {node.name}({ast.unparse(node.args)}) in {path.stem} do?"
                answer = " ".join(text.partition("\n\n")[0].split())
                yield {
                    "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer[:300]}]
                }


def write_data() -> int:
    """Write tokenizer, conversations and token files. Return the size of the vocabulary."""
    CHATS.mkdir(parents=True, exist_ok=True)
    train_tokenizer(stdlib_modules()[::8], TOKENIZER, 1024)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(TOKENIZER)
    chats = list(conversations())
    held_out = chats[::20]
    train = [chat for number, chat in enumerate(chats) if number % 20]
    for name, part in {"held_out": held_out, "teacher": train, "student": train[::10]}.items():
        (CHATS / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in part))
        prepare([str(CHATS / f"{name}.jsonl")], str(ROOT / name), str(TOKENIZER), progress=False)
    return len(tokenizer)


def adapt(recipe: run.Partial, data: str, vocab_size: int, layers: int, width: int) -> run.Partial:
    """Return a recipe of the quickstart with another model and other data."""
    model = recipe.student
    model.num_layers, model.hidden_size, model.ffn_hidden_size = layers, width, 3 * width
    model.num_attention_heads, model.num_query_groups = width // 32, width // 64
    model.vocab_size = vocab_size
    recipe.data.train, recipe.data.valid = [str(ROOT / data)], [str(ROOT / "held_out")]
    recipe.data.tokenizer = str(TOKENIZER)
    recipe.data.loss_on = "assistant"  # the default of the token files' masks
    recipe.optimizer.lr, recipe.optimizer.min_lr = 4e-3, 4e-4  # high, as the models are small and the runs short
    recipe.training.eval_interval = recipe.checkpoint.save_interval = recipe.training.steps  # at the end only
    return recipe


def held_out_loss(name: str) -> float:
    """Return a run's last held-out loss, a mean over the tokens of answers."""
    lines = [json.loads(line) for line in (ROOT / name / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if line["kind"] == "eval"][-1]


if __name__ == "__main__":
    vocab_size = write_data()
    recipes = {
        "teacher": adapt(quickstart_teacher(80, str(ROOT)), "teacher", vocab_size, layers=3, width=128),
        "alone": adapt(quickstart_alone(50, str(ROOT)), "student", vocab_size, layers=2, width=64),
        "distilled": adapt(quickstart(50, str(ROOT)), "student", vocab_size, layers=2, width=64),
    }
    run.run(recipes["teacher"], executor=local(processes=1), name="teacher")
    with run.Experiment("students") as students:  # both at once
        for name in ("alone", "distilled"):
            students.add(recipes[name], executor=local(processes=1), name=name)
        students.run(tail_logs=True)
    losses = {name: held_out_loss(name) for name in recipes}
    print("held-out loss on answers, nats a token")
    for name, loss in losses.items():
        print(f"  {name:10} {loss:.3f}")
    assert losses["distilled"] < losses["alone"], "the teacher did not help"
    print(f"look at the data: nemo distill inspect data={ROOT}/held_out")

"""Conversations become exactly the tokens that the tokenizer's template writes; the assistant's words count."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import torch
from rich.console import Console

import distill_nemo.data.prepare as module
from distill_nemo.config import DataConfig, TrainingConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.datasets import build_datasets
from distill_nemo.data.inspect import inspect_documents, shown_documents
from distill_nemo.data.prepare import prepare
from distill_nemo.data.token_masks import TokenMask
from tests.unit.data.chat_templates import (
    BRACKETS,
    CHATML,
    GPT_OSS,
    HEADERS,
    LINE_BREAK,
    MARKED,
    SPECIAL,
    SWALLOWING,
    TURNS,
    write_tokenizer,
)

USER, FOUR = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": " The answer is four. "}
AGAIN, NINE = {"role": "user", "content": "And 3 × 3?"}, {"role": "assistant", "content": "nine"}
CHAT = {"messages": [USER, FOUR, AGAIN, NINE]}


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prepared(tmp_path: Path, records: list | str, template: str | list | None = CHATML, tokens=(), **options) -> str:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template, tokens)
    source = records if isinstance(records, str) else write(tmp_path / "in.jsonl", records)
    prepare([source], str(tmp_path / "out"), tokenizer, **{"num_workers": 1, "progress": False} | options)
    return str(tmp_path / "out")


def documents(prefix: str, only_last: bool = False) -> list[tuple[str, list[str]]]:
    """Return each document's text, and its runs of tokens that count."""
    fast = tokenizers.Tokenizer.from_file(str(Path(prefix).parent / "tokenizer" / "tokenizer.json"))
    lengths = np.fromfile(
        f"{prefix}.idx", np.int32, offset=34, count=json.loads(Path(f"{prefix}.json").read_text())["documents"]
    )
    ids, mask, first, found = np.fromfile(f"{prefix}.bin", np.uint16), TokenMask(prefix, only_last), 0, []
    for length in map(int, lengths):
        bits, own = mask.of_document(first, length), ids[first : first + length].tolist()
        edges = np.flatnonzero(np.diff(bits, prepend=0, append=0)).reshape(-1, 2)
        decode = lambda part: fast.decode(part, skip_special_tokens=False)  # noqa: E731
        found.append((decode(own), [decode(own[start:stop]) for start, stop in edges]))
        first += length
    return found


TEMPLATES = {
    "chatml": (CHATML, [" The answer is four. <|im_end|>", "nine<|im_end|>"]),
    "headers": (HEADERS, ["The answer is four.<|eot_id|>", "nine<|eot_id|>"]),
    "brackets": (BRACKETS, [" The answer is four. </s>", "nine</s>"]),
    "turns": (TURNS, [" The answer is four. <end_of_turn>", "nine<end_of_turn>"]),
    "markers": (MARKED, [" The answer is four. <|im_end|>", "nine<|im_end|>"]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_assistants_words_and_their_end_count(tmp_path: Path, name: str):
    from transformers import PreTrainedTokenizerFast

    template, answers = TEMPLATES[name]
    prefix = prepared(tmp_path, [CHAT], template)
    ((text, counted),) = documents(prefix)
    oracle = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "tokenizer"))
    assert text == oracle.apply_chat_template(CHAT["messages"], tokenize=False)
    assert np.fromfile(f"{prefix}.bin", np.uint16).tolist() == oracle(text, add_special_tokens=False).input_ids
    assert counted == answers
    assert documents(prefix, only_last=True)[0][1] == answers[-1:]


def test_earlier_answers_lose_their_reasoning_and_end_where_the_template_drops_it_and_the_user_is_told(
    tmp_path: Path, capsys
):
    thinking = {"reasoning_content": "three times"}
    chat, final = {"messages": [USER, FOUR | thinking, AGAIN, NINE | thinking]}, "<|channel|>final<|message|>"
    answer = f"<|channel|>analysis<|message|>three times<|end|><|start|>assistant{final}nine<|return|>"
    assert documents(prepared(tmp_path, [chat], GPT_OSS))[0][1] == [f"{final} The answer is four. ", answer]
    told = "the chat template leaves out the reasoning of 1 earlier answer; the rest of them counts\n"
    assert told in capsys.readouterr().out
    (tmp_path / "last").mkdir()
    assert documents(prepared(tmp_path / "last", [chat], GPT_OSS, loss_on="last"))[0][1] == [answer]
    assert "leaves out" not in capsys.readouterr().out


def test_a_token_over_the_boundary_is_refused(tmp_path: Path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(ValueError, match="a token on both sides of a boundary"):
        prepared(tmp_path, [{"messages": [USER, {"role": "assistant", "content": "answer"}]}], template)


def test_a_line_break_that_is_an_added_token_ends_no_turn(tmp_path: Path):
    _, counted = documents(prepared(tmp_path, [CHAT], TURNS, [LINE_BREAK]))[0]
    assert counted == TEMPLATES["turns"][1]


def test_blanks_that_a_special_token_takes_up_cross_no_boundary(tmp_path: Path):
    template = CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>assistant\\n", "<|end|>\\n")
    template = template.replace("'<|im_start|>' + m.role", "('<|end|>' if m.role == 'assistant' else m.role)")
    _, counted = documents(prepared(tmp_path, [CHAT], template, [SWALLOWING]))[0]
    assert counted == ["The answer is four. <|end|>", "nine<|end|>"]


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
CALL = {"function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
TOOL_CHAT = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, FOUR]
SHAREGPT = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": FOUR["content"]}]
PARTS = [USER | {"content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}, FOUR]
SHAPES = {
    "messages": ("chat", {"messages": [USER, FOUR]}),
    "parts": ("chat", {"messages": PARTS}),
    "sharegpt": ("chat", {"conversations": SHAREGPT, "id": 3}),
    "JSON in a string": ("chat", {"messages": json.dumps([USER, FOUR])}),
    "prompt and completion": ("instruction", {"prompt": USER["content"], "completion": FOUR["content"]}),
    "messages in a pair": ("instruction", {"prompt": [USER], "completion": [FOUR]}),
    "instruction": ("instruction", {"instruction": USER["content"], "input": "", "output": FOUR["content"]}),
    "OpenOrca": ("instruction", {"system_prompt": "", "question": USER["content"], "response": FOUR["content"]}),
    "query": ("instruction", {"query": USER["content"], "response": FOUR["content"]}),
    "problem": ("instruction", {"problem": USER["content"], "solution": FOUR["content"]}),
    "desired": ("instruction", {"prompt": USER["content"], "completion": FOUR["content"], "label": True}),
    "roles in capitals": ("chat", {"messages": [USER | {"role": "User"}, FOUR | {"role": "BOT"}]}),
    "columns of messages": (
        "chat",
        {"messages": {"role": ["user", "assistant"], "content": [USER["content"], FOUR["content"]], "name": []}},
    ),
    "Dolly": ("instruction", {"instruction": USER["content"], "context": "", "response": FOUR["content"]}),
    "messages alone": ("chat", [USER, FOUR]),
    "question": ("instruction", {"question": USER["content"], "answer": FOUR["content"]}),
    "preference": ("preference", {"prompt": USER["content"], "chosen": FOUR["content"], "rejected": "five"}),
    "preference of messages": ("preference", {"chosen": [USER, FOUR], "rejected": [USER, NINE]}),
    "preference that repeats": ("preference", {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, NINE]}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_tokens(tmp_path: Path, capsys, shape: str):
    kind, record = SHAPES[shape]
    found = documents(prepared(tmp_path, [record]))
    assert f"format: {kind} (from the first record" in capsys.readouterr().out
    user, answer = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n", " The answer is four. <|im_end|>"
    assert found == [(f"{user}<|im_start|>assistant\n{answer}\n", [answer])]


def test_the_input_of_an_instruction_follows_it(tmp_path: Path):
    alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    dolly = {"instruction": "Add.", "context": "2, 2", "response": "4", "system": "Be brief."}
    for text, _ in documents(prepared(tmp_path, [alpaca, dolly])):
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n\n2, 2<|im_end|>")


def test_lines_and_elements_may_be_lists_of_messages(tmp_path: Path):
    chats = [[USER, FOUR], [USER, FOUR, AGAIN, NINE]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "b.json").write_text(json.dumps(chats))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(chat, indent=2) for chat in chats))
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    for name in ("a.jsonl", "b.json", "c.json"):
        prepare([str(tmp_path / name)], str(tmp_path / f"{name}_out"), tokenizer, progress=False)
        assert [len(counted) for _, counted in documents(str(tmp_path / f"{name}_out"))] == [1, 2]


def test_tool_calls_are_the_assistants_words(tmp_path: Path):
    chat, template = {"messages": TOOL_CHAT, "tools": TOOLS}, "{{ tools | tojson }}" + CHATML
    _, counted = documents(prepared(tmp_path, [chat], template))[0]
    assert counted == ['<tool_call>add {"a": 2, "b": 2}</tool_call><|im_end|>', " The answer is four. <|im_end|>"]


@pytest.mark.parametrize("calls", [json.dumps([CALL]), [CALL["function"]], json.dumps([CALL["function"]])])
def test_tool_calls_may_be_text_or_without_a_wrapper(tmp_path: Path, calls: list | str):
    template = CHATML.replace("call.function.", "(call.function or call).")
    _, counted = documents(
        prepared(tmp_path, [{"messages": [USER, FOUR | {"content": None, "tool_calls": calls}]}], template)
    )[0]
    assert counted == ['<tool_call>add {"a": 2, "b": 2}</tool_call><|im_end|>']


@pytest.mark.parametrize("arguments", [{}, {"arguments": ""}, {"arguments": None}, {"arguments": "{}"}])
def test_a_call_without_arguments_has_an_empty_object(tmp_path: Path, arguments: dict):
    call = {"function": {"name": "now"} | arguments}
    _, counted = documents(prepared(tmp_path, [{"messages": [USER, FOUR | {"content": None, "tool_calls": [call]}]}]))[
        0
    ]
    assert counted == ["<tool_call>now {}</tool_call><|im_end|>"]


def test_a_function_call_of_sharegpt_is_a_tool_call(tmp_path: Path):
    turns = [{"from": "function_call", "value": json.dumps(CALL["function"])}, {"from": "observation", "value": "4"}]
    chat = {"conversations": [SHAREGPT[0], *turns, SHAREGPT[1]], "tools": json.dumps(TOOLS)}
    found = documents(prepared(tmp_path, [chat], "{{ tools | tojson }}" + CHATML))
    (tmp_path / "openai").mkdir()
    as_openai = {"messages": TOOL_CHAT, "tools": TOOLS}
    assert found == documents(prepared(tmp_path / "openai", [as_openai], "{{ tools | tojson }}" + CHATML))


def test_messages_may_stand_under_a_key_that_is_named(tmp_path: Path):
    rows = [{"dialog": [USER, FOUR], "text": "x"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    source = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match="or format=chat and text_key to its messages"):
        prepared(tmp_path, source, text_key="words")
    for path in (source, str(tmp_path / "in.parquet")):
        (tmp_path / Path(path).suffix).mkdir()
        prefix = prepared(tmp_path / Path(path).suffix, path, format="chat", text_key="dialog")
        assert documents(prefix)[0][1] == [" The answer is four. <|im_end|>"]


def test_if_all_records_are_bad_they_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no document .*; 2 bad records:\n.*ends with a message of the user"):
        prepared(tmp_path, [{"messages": [USER]}] * 2, max_bad_records=9)


def test_an_answer_that_is_not_desired_is_not_learnt(tmp_path: Path):
    record = {"prompt": USER["content"], "completion": FOUR["content"]}
    with pytest.raises(ValueError, match=r'in\.jsonl:2 has the "label" false'):
        prepared(tmp_path, [record | {"label": True}, record | {"label": False}])


def test_a_template_for_tools_is_used_for_conversations_with_tools(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}" + CHATML}]
    records = [{"messages": [USER, FOUR]}, {"messages": [USER, FOUR], "tools": TOOLS}]
    found = [text for text, _ in documents(prepared(tmp_path, records, named))]
    oracle = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "tokenizer"))
    rendered = [oracle.apply_chat_template([USER, FOUR], r.get("tools"), tokenize=False) for r in records]
    assert found == rendered and rendered[0] != rendered[1]
    oracle.save_pretrained(tmp_path / "again")  # chat_template.jinja and additional_chat_templates/tool_use.jinja
    prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "again_out"), str(tmp_path / "again"), progress=False)
    assert Path(f"{tmp_path}/again_out.bin").read_bytes() == Path(f"{tmp_path}/out.bin").read_bytes()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_nested_columns_are_read(tmp_path: Path, suffix: str):
    table = pa.table({"messages": [CHAT["messages"]] * 3, "score": [1, 2, 3]})
    source = tmp_path / f"in.{suffix}"
    if suffix == "parquet":
        pa.parquet.write_table(table, source)
    else:
        with pa.ipc.new_stream(source, table.schema) as writer:
            writer.write_table(table)
    assert [counted for _, counted in documents(prepared(tmp_path, str(source)))] == [TEMPLATES["chatml"][1]] * 3


def test_keys_of_another_rows_tools_are_left_out(tmp_path: Path):
    """A table gives all rows of a nested column the same keys, and those that a row lacks are null."""
    calls = [{"function": {"name": "add", "arguments": arguments}} for arguments in ({"a": 2}, {"b": {"c": 3}})]
    rows = [{"messages": [USER, FOUR | {"tool_calls": [call]}], "tools": [call]} for call in calls]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    template = "{{ tools | tojson }}" + CHATML
    found = documents(prepared(tmp_path, str(tmp_path / "in.parquet"), template))
    (tmp_path / "lines").mkdir()
    assert found == documents(prepared(tmp_path / "lines", rows, template))
    assert found[0][1] == [' The answer is four. <tool_call>add {"a": 2}</tool_call><|im_end|>']


ADD = {"name": "add"}
BAD = {
    "ends with a message of the user": [CHAT, {"messages": [USER, FOUR, USER]}],
    r'the role .robot.; known are .*human': [CHAT, {"messages": [USER | {"role": "robot"}, FOUR]}],
    "has none of the keys messages, .* it has text": [CHAT, {"text": "plain"}],
    "a content with parts other than text": [CHAT, {"messages": [USER | {"content": [{"type": "image"}]}, FOUR]}],
    'has a "messages" without messages': [CHAT, {"messages": []}],
    'has a "messages" of type int, not a text or a list of messages': [CHAT, {"messages": 4}],
    "has none of the keys messages, .* it has id, messages = null": [CHAT, {"id": 4, "messages": None}],
    "a content of type NoneType": [CHAT, {"messages": [USER, FOUR | {"content": None}]}],
    "that is not JSON": [CHAT, {"messages": [USER, FOUR | {"tool_calls": [ADD | {"arguments": "{"}]}]}],
    r"the role .'user'.; known are": [CHAT, {"messages": [USER | {"role": ["user"]}, FOUR]}],
    "a function_call, which templates do not read": [CHAT, {"messages": [USER, FOUR | {"function_call": {}}]}],
    "tool_calls that are not a list": [CHAT, {"messages": [USER, FOUR | {"tool_calls": CALL}]}],
    "a value of type int, not an object": [
        CHAT,
        {"messages": [USER, FOUR | {"tool_calls": [ADD | {"arguments": "3"}]}]},
    ],
    'the key "a" twice in one object': [
        CHAT,
        {"messages": [USER, FOUR | {"tool_calls": [ADD | {"arguments": '{"a": 1, "b": 2, "a": 3}'}]}]},
    ],
    "a tool call without a name": [CHAT, {"messages": [USER, FOUR | {"tool_calls": [{"arguments": {}}]}]}],
    r"conversations.\[1\] a text that is not JSON": [
        CHAT,
        {"conversations": [*SHAREGPT[:1], {"from": "function_call", "value": "add"}, *SHAREGPT]},
    ],
    "with parts other than text": [CHAT, {"messages": [USER | {"content": [{"type": "image", "text": "A"}]}, FOUR]}],
    'under "system" a value of type dict': [CHAT, CHAT | {"system": {}}],
    "a reasoning of type list": [CHAT, {"messages": [USER, FOUR | {"reasoning_content": ["so"]}]}],
    "the weight 0.5; known are 0 and 1": [CHAT, {"messages": [USER, FOUR | {"weight": 0.5}, AGAIN, NINE]}],
    "half of a surrogate pair": [CHAT, {"messages": [USER | {"content": "\ud800"}, FOUR]}],
    "holds a run of zero bytes": [CHAT, {"messages": [USER | {"content": "a" + "\0" * 8}, FOUR]}],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_conversations_are_counted_and_named(tmp_path: Path, capsys, message: str):
    with pytest.raises(ValueError, match=rf"1 bad record, .*\n.*in\.jsonl:2 .*{message}"):
        prepared(tmp_path, BAD[message])
    assert len(documents(prepared(tmp_path, BAD[message], max_bad_records=1))) == 1
    assert "skipped 1 bad record" in capsys.readouterr().out


def test_what_a_template_raises_is_a_bad_record(tmp_path: Path):
    with pytest.raises(ValueError, match=r"in\.jsonl:1 is refused by the chat template: only user and assistant"):
        prepared(tmp_path, [{"messages": [{"role": "system", "content": "x"}, USER, FOUR]}], BRACKETS)


def test_what_a_template_raises_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"in\.jsonl:1 is refused by the chat template: a b$"):
        prepared(tmp_path, [CHAT], "{{ raise_exception('a\\nb') }}")


def test_a_conversation_in_which_nothing_counts_is_a_bad_record(tmp_path: Path):
    silent = {"messages": [USER, FOUR | {"content": ""}]}
    with pytest.raises(ValueError, match=r"in\.jsonl:1 has no token that counts"):
        prepared(tmp_path, [silent], "{% for m in messages %}{{ m.content }}{% endfor %}")


LEFT_OUT = {
    "constant": ("hello", r"a message 0 \(from 0, user\)"),
    "no answer": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "content in message 1"),
    "no tools": (CHATML, "tools"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_template_leaves_out_is_named(tmp_path: Path, name: str):
    template, what = LEFT_OUT[name]
    with pytest.raises(ValueError, match=rf"in\.jsonl:1 has {what} .*that the chat template leaves out"):
        prepared(tmp_path, [CHAT | ({"tools": TOOLS} if name == "no tools" else {})], template)


def test_markers_in_a_comment_are_none(tmp_path: Path):
    assert documents(prepared(tmp_path, [CHAT], "{# {% generation %} #}" + CHATML))[0][1] == TEMPLATES["chatml"][1]


def test_the_last_answer_is_not_taken_for_another_that_has_no_markers(tmp_path: Path):
    template = MARKED.replace("{%- if m.role == 'assistant' -%}", "{%- if m.role == 'assistant' and m.content -%}")
    chat = {"messages": [USER, FOUR, AGAIN, NINE | {"content": ""}]}
    assert documents(prepared(tmp_path, [chat], template))[0][1] == TEMPLATES["markers"][1][:1]
    with pytest.raises(ValueError, match=r"in\.jsonl:1 has 2 messages of the assistant, .* marks 1 text"):
        prepared(tmp_path, [chat], template, loss_on="last")


MARKED_TURN = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
INSIDE = {
    "macro": "{%- macro turn(m) -%}" + MARKED_TURN + "{%- endmacro -%}{% for m in messages %}TURN{% endfor %}",
    "set": "{% for m in messages %}{% set turn %}" + MARKED_TURN + "{% endset %}TURN{% endfor %}",
    "filter": "{% for m in messages %}TURN{% endfor %}",
}
TURNS_OF_BOTH = "{% if m.role == 'user' %}{{ m.content }}{% else %}ANSWER{% endif %}"


@pytest.mark.parametrize(("name", "answer"), [("macro", "{{ turn(m) }}"), ("set", "{{ turn }}")])
def test_markers_inside_another_block_are_found(tmp_path: Path, name: str, answer: str):
    template = INSIDE[name].replace("TURN", TURNS_OF_BOTH.replace("ANSWER", answer))
    assert documents(prepared(tmp_path, [CHAT], template))[0][1] == TEMPLATES["chatml"][1]


def test_markers_inside_a_block_that_changes_their_text_are_refused(tmp_path: Path):
    template = INSIDE["filter"].replace("TURN", "{%- filter trim -%}" + MARKED_TURN + "{% endfilter %}")
    with pytest.raises(ValueError, match=r"in\.jsonl:1 is changed by the markers \{% generation %\}"):
        prepared(tmp_path, [CHAT], template)


def test_a_template_that_needs_a_first_message_says_so(tmp_path: Path):
    chat, template = {"messages": [NINE, USER, FOUR]}, "{{ messages[0].role[:0] }}" + CHATML
    with pytest.raises(ValueError, match=r"in\.jsonl:1 begins with the assistant, .* set loss_on=last"):
        prepared(tmp_path, [chat], template)
    assert documents(prepared(tmp_path, [chat], template, loss_on="last"))[0][1] == TEMPLATES["chatml"][1][:1]


def test_a_preference_that_repeats_a_part_of_its_prompt_is_refused(tmp_path: Path):
    record = {"prompt": USER["content"], "chosen": [{"role": "system", "content": "Be brief."}, USER, FOUR]}
    with pytest.raises(ValueError, match=r"repeats the end of .prompt., but not all of it"):
        prepared(tmp_path, [record | {"rejected": "five"}])


def test_an_input_that_is_not_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match='has under "input" a value of type list'):
        prepared(tmp_path, [{"instruction": "Add.", "input": [2, 2], "output": "4"}])


def test_a_template_cannot_reach_python(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is refused by the chat template: .*(unsafe|mro|__class__)"):
        prepared(tmp_path, [CHAT], "{{ messages.__class__.__mro__ }}")


def test_a_tokenizer_without_a_template_is_refused_with_the_way_out(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no chat template.*chat_template=FILE"):
        prepared(tmp_path, [CHAT], None)
    (tmp_path / "mine.jinja").write_text(CHATML)
    prefix = prepared(tmp_path, [CHAT], None, chat_template=str(tmp_path / "mine.jinja"))
    assert documents(prefix)[0][1] == TEMPLATES["chatml"][1]


def test_a_template_that_is_not_text_is_named(tmp_path: Path):
    (tmp_path / "mine.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat template .*mine\.jinja is not UTF-8"):
        prepared(tmp_path, [CHAT], chat_template=str(tmp_path / "mine.jinja"))


@pytest.mark.parametrize("broken", ["{% for m in messages %}\n{% endfro %}", "\n{{ messages | unknown }}"])
def test_a_template_that_is_not_jinja_is_refused_once(tmp_path: Path, broken: str):
    with pytest.raises(ValueError, match=r"^\S+tokenizer: the chat template is not valid Jinja: line 2: "):
        prepared(tmp_path, [CHAT] * 3, broken, max_bad_records=9)


def test_a_tokenizer_that_lacks_a_token_is_refused(tmp_path: Path):
    (tmp_path / "words").mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "<unk>")).save(str(tmp_path / "words/tokenizer.json"))
    (tmp_path / "words/chat_template.jinja").write_text(CHATML)
    source = write(tmp_path / "in.jsonl", [CHAT])
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode a conversation: .*Missing"):
        prepare([source], str(tmp_path / "out"), str(tmp_path / "words"), num_workers=1, progress=False)


def test_options_for_conversations_are_refused_for_texts(tmp_path: Path):
    with pytest.raises(ValueError, match="loss_on is for conversations"):
        prepared(tmp_path, [{"text": "plain"}], loss_on="last")
    with pytest.raises(ValueError, match="chat_template is for conversations"):
        prepared(tmp_path, [{"text": "plain"}], chat_template="x")


def test_a_format_that_is_given_decides(tmp_path: Path):
    both = CHAT | {"text": "What is the answer?"}
    prepare(
        [write(tmp_path / "in.jsonl", [both])],
        str(tmp_path / "o"),
        write_tokenizer(tmp_path / "t", None),
        format="text",
    )
    assert not (tmp_path / "o.mask").exists()


def test_any_number_of_workers_writes_the_same_mask(tmp_path: Path, monkeypatch):
    records = [{"messages": [USER, FOUR | {"content": f"It is {i} " * (i % 7 + 1)}]} for i in range(400)]
    whole = prepared(tmp_path, records)
    expected = {suffix: Path(whole + suffix).read_bytes() for suffix in (".bin", ".idx", ".mask")}
    monkeypatch.setattr(module, "MIN_PART_BYTES", 3000)
    source, tokenizer = str(tmp_path / "in.jsonl"), str(tmp_path / "tokenizer")
    result = prepare([source], str(tmp_path / "again"), tokenizer, num_workers=2, progress=False)
    assert {suffix: Path(f"{tmp_path / 'again'}{suffix}").read_bytes() for suffix in expected} == expected
    assert result.counted_tokens == sum(
        int(np.unpackbits(np.frombuffer(expected[".mask"], np.uint8)).sum()) for _ in "1"
    )
    manifest = json.loads((tmp_path / "again.json").read_text())
    assert (manifest["format"], manifest["loss_on"]) == ("chat", "assistant")


def test_new_texts_leave_no_old_mask(tmp_path: Path):
    prefix = prepared(tmp_path, [CHAT])
    Path(f"{prefix}.json").unlink()
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).unlink()
    write(tmp_path / "in.jsonl", [{"text": "plain"}])
    prepare([str(tmp_path / "in.jsonl")], prefix, str(tmp_path / "tokenizer"), progress=False)
    assert not Path(f"{prefix}.mask").exists()


def test_files_without_their_mask_are_not_left_behind(tmp_path: Path, monkeypatch):
    """A job that is killed while it publishes leaves nothing that a run would read without the mask."""
    real = module.os.replace

    def killed(source, target) -> None:
        if str(target).endswith("out.mask"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, [CHAT])
    with pytest.raises(ValueError, match=r"no file .*out\.idx"):
        check_corpora(DataConfig(train=[str(tmp_path / "out")]))
    monkeypatch.undo()
    assert documents(prepared(tmp_path, [CHAT]))[0][1] == TEMPLATES["chatml"][1]


def test_inspect_shows_what_counts_and_no_control_character_of_the_text(tmp_path: Path):
    prefix = prepared(tmp_path, [{"messages": [USER, NINE | {"content": "red\x1b[31m\x9b\r\n\tline"}]}])
    shown = []
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
        inspect_documents(prefix, 3, None, console)
        shown.append(console.file.getvalue())
    assert "⟦red␛[31m\ufffd␍\n␉line<|im_end|>⟧\n" in shown[0]
    assert "red␛[31m\ufffd␍\n␉line<|im_end|>\n" in shown[1] and "⟦" not in shown[1]


def test_inspect_shows_whole_characters_and_the_beginning_of_a_long_document(tmp_path: Path):
    prefix = prepared(tmp_path, [{"messages": [USER, NINE | {"content": "é🙂" * 20}]}])
    (whole,), (cut,) = shown_documents(f"{prefix}.bin", 1), shown_documents(prefix, 1, max_tokens=30)
    assert "".join(text for text, counts in whole.tokens if counts) == "é🙂" * 20 + "<|im_end|>"
    assert whole.num_left_out == 0 and cut.num_left_out > 0 and len(cut.tokens) <= 30


def test_inspect_names_its_field_and_refuses_another_tokenizer(tmp_path: Path):
    prefix = prepared(tmp_path, [CHAT])
    other = Path(write_tokenizer(tmp_path / "other", CHATML)) / "tokenizer.json"
    other.write_text(other.read_text().replace('"<|im_end|>"', '"<|over|>"'))
    with pytest.raises(ValueError, match=r"is another tokenizer than the one of .*'<\|over\|>' and '<\|im_end\|>'"):
        list(shown_documents(prefix, 1, str(other.parent)))
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(ValueError, match=r"^data: no file .*\.bin"):
        list(shown_documents(prefix, 1))


def samples(tmp_path: Path, prefix: str, **options) -> list[dict]:
    data = DataConfig(train=[prefix], valid=[prefix], sequence_length=24, **options)
    train, _ = build_datasets(data, TrainingConfig(), tmp_path / "cache", 12, 0, 400)
    return [train[i] for i in range(12)]


@pytest.mark.parametrize("loss_on", [None, "assistant", "last", "all"])
def test_a_label_counts_if_its_token_does(tmp_path: Path, loss_on: str | None):
    names = ["one", "two", "three", "four", "five"]
    records = [{"messages": [USER, FOUR | {"content": name}, AGAIN, NINE | {"content": name * 2}]} for name in names]
    prefix = prepared(tmp_path, records)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    answers = {token for text in (*names, "<|im_end|>") for token in fast.encode(text).ids}
    asked = {token for text in ("user", "assistant", "What is 2 + 2?") for token in fast.encode(text).ids}
    found = samples(tmp_path, prefix, loss_on=loss_on)
    counted = torch.cat([sample["labels"][sample["loss_mask"] > 0] for sample in found]).tolist()
    left_out = torch.cat([sample["labels"][sample["loss_mask"] == 0] for sample in found]).tolist()
    if loss_on == "all":
        assert not left_out
        return
    start = SPECIAL.index("<|im_start|>")
    assert start not in counted and start in left_out and set(counted) <= answers
    assert SPECIAL.index("<|im_end|>") in counted and set(left_out) & asked
    runs = sum(np.flatnonzero(np.diff(sample["loss_mask"].numpy(), prepend=0) == 1).size for sample in found)
    ends = counted.count(SPECIAL.index("<|im_end|>"))
    assert ends <= runs <= ends + 12  # a run may begin in one sample and end in the next


def test_a_mask_of_another_length_or_none_is_refused(tmp_path: Path):
    prefix = prepared(tmp_path, [CHAT])
    data, mask = DataConfig(train=[prefix]), Path(f"{prefix}.mask")
    check_corpora(data)
    whole = mask.read_bytes()
    for content, problem in ((whole[:-1], "truncated"), (whole + b"\0", "too long")):
        mask.write_bytes(content)
        with pytest.raises(ValueError, match=rf"out\.mask is {problem}"):
            check_corpora(data)
    mask.unlink()
    with pytest.raises(ValueError, match=r"data\.train: no file .*out\.mask, which says which tokens count"):
        check_corpora(data)


def test_another_mask_of_the_same_size_is_refused(tmp_path: Path):
    prefix = prepared(tmp_path, [CHAT])
    mask = Path(f"{prefix}.mask")
    mask.write_bytes(bytes(255 - byte for byte in mask.read_bytes()))
    with pytest.raises(ValueError, match=r"out\.mask is another one than was prepared"):
        check_corpora(DataConfig(train=[prefix]))


UNMARKED_END = (
    "{% for m in messages %}{{ '[INST]' + m.content if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
ADJOINING = {
    "two answers in a row": ([USER, FOUR, NINE], UNMARKED_END),
    "a last answer that is not learnt": ([USER, FOUR, AGAIN, NINE | {"train": False}], CHATML),
    "two markers in a turn": (
        [USER, FOUR],
        MARKED.replace("+ '<|im_end|>' }}", "}}{% endgeneration %}{% generation %}x"),
    ),
}


@pytest.mark.parametrize("name", ADJOINING)
def test_the_last_answer_is_not_read_from_a_mask_that_does_not_show_it(tmp_path: Path, name: str):
    messages, template = ADJOINING[name]
    prefix = prepared(tmp_path, [CHAT, {"messages": messages}], template)
    check_corpora(DataConfig(train=[prefix], loss_on="assistant"))
    with pytest.raises(ValueError, match=r"does not show where the last answer .* prepare with loss_on=last"):
        check_corpora(DataConfig(train=[prefix], loss_on="last"))


def test_the_last_answer_after_a_tool_is_its_own(tmp_path: Path):
    chat, template = {"messages": TOOL_CHAT, "tools": TOOLS}, "{{ tools | tojson }}" + CHATML
    prefix = prepared(tmp_path, [chat], template)
    check_corpora(DataConfig(train=[prefix], loss_on="last"))
    assert documents(prefix, only_last=True)[0][1] == [" The answer is four. <|im_end|>"]


def test_a_bad_first_line_does_not_decide_the_format(tmp_path: Path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"broken\n[1]\n{"id": 3}\n' + json.dumps(CHAT) + "\n")
    prepared(tmp_path, str(source), max_bad_records=3)
    assert "format: chat" in capsys.readouterr().out


def test_a_text_file_among_conversations_is_a_bad_record(tmp_path: Path, capsys):
    (tmp_path / "chats").mkdir()
    for name in ("a.jsonl", "c.jsonl"):
        write(tmp_path / "chats" / name, [CHAT])
    (tmp_path / "chats" / "b.md").write_text("Notes on the chats.")
    prefix = prepared(tmp_path, str(tmp_path / "chats"), max_bad_records=1)
    assert len(documents(prefix)) == 2
    assert f"{tmp_path / 'chats' / 'b.md'} is a text, and the records are of format chat\n" in capsys.readouterr().out


def test_a_field_that_is_null_is_read_from_its_other_name(tmp_path: Path):
    both = [{"role": None, "content": None, **message} for message in SHAREGPT]
    assert documents(prepared(tmp_path, [{"conversations": both}])) == documents(
        prepared(tmp_path, [{"messages": [USER, FOUR]}])
    )


def test_tokens_that_were_left_out_when_prepared_cannot_be_asked_for(tmp_path: Path):
    prefix = prepared(tmp_path, [CHAT], loss_on="last")
    check_corpora(DataConfig(train=[prefix], loss_on="last"))
    with pytest.raises(ValueError, match=r"data\.loss_on = assistant, but .* was prepared with loss_on=last"):
        check_corpora(DataConfig(train=[prefix], loss_on="assistant"))


def test_documents_apart_have_positions_of_their_own_and_no_label_of_the_next(tmp_path: Path):
    records = [{"messages": [USER, FOUR | {"content": "It is " + name}]} for name in ("one", "two", "three", "four")]
    prefix = prepared(tmp_path, records)
    begins, boundaries = SPECIAL.index("<|im_start|>"), 0  # the first token of a document, and a later one
    for sample, plain in zip(
        samples(tmp_path, prefix, loss_on="all", reset_at_documents=True),
        samples(tmp_path, prefix, loss_on="all"),
        strict=True,
    ):
        tokens, labels, starts = sample["tokens"], sample["labels"], sample["document_starts"]
        assert torch.equal(tokens, plain["tokens"]) and torch.equal(labels, plain["labels"])
        assert torch.equal(sample["position_ids"], torch.arange(len(tokens)) - starts)
        first = torch.arange(len(tokens)) == starts
        assert first[0] and (tokens[1:][first[1:]] == begins).all()
        boundaries += int(first[1:].sum())
        assert torch.equal(sample["loss_mask"][:-1] == 0, first[1:])
        assert sample["loss_mask"][-1] == 1 or labels[-1] == begins
    assert boundaries > 5

"""Templates of the structure of well-known models': the assistant's words and their end count, or it is refused."""

from pathlib import Path

import pytest
import tokenizers

from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.chat_tokens import chat_of, chat_tokens
from distill_nemo.data.conversations import RecordError, conversation_of
from distill_nemo.data.jinja import START, STOP, compiled
from distill_nemo.data.tokenizer import load_tokenizer
from tests.unit.data.chat_templates import (
    CHATML,
    DEEPSEEK,
    GEMMA,
    GPT_OSS,
    HEADERS,
    LLAMA,
    MARKED,
    MISTRAL,
    PHI,
    QWEN2,
    QWEN3,
    QWEN35,
    R1,
    write_tokenizer,
)

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}
FOUR, NINE = {"role": "assistant", "content": "four"}, {"role": "assistant", "content": "nine"}
AGAIN = {"role": "user", "content": "And 3 × 3?"}
CALL = {"id": "a23456789", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLS, RESULT = {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": '{"sum": 4}'}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
THOUGHT = {"reasoning": "two and two"}
CHATS = {
    "system": {"messages": [SYSTEM, USER, FOUR]},
    "turns": {"messages": [USER, FOUR, AGAIN, NINE]},
    "tools": {"messages": [USER, CALLS, RESULT, FOUR], "tools": TOOLS},
    "tools, then turns": {"messages": [SYSTEM, USER, CALLS, RESULT, FOUR, AGAIN, NINE], "tools": TOOLS},
    "two calls": {"messages": [USER, CALLS | {"tool_calls": [CALL, CALL]}, RESULT, RESULT, FOUR], "tools": TOOLS},
    "reasoning": {"messages": [USER, FOUR | THOUGHT]},
    "reasoning in turns": {"messages": [USER, FOUR | THOUGHT, AGAIN, NINE | THOUGHT]},
    "reasoning with tools": {"messages": [USER, CALLS | THOUGHT, RESULT, FOUR | THOUGHT], "tools": TOOLS},
}
REFUSED = "is refused by the chat template"
NO_TOOLS, NO_REASON = "has tools that the chat template leaves out", r"has reasoning in message \d .* leaves out"
LLAMA_CALL = '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
THINK = "<think>\ntwo and two\n</think>\n\n"
MISTRAL_CALL = '{"name": "add", "arguments": {"a": 2}, "id": "a23456789"}'
DEEPSEEK_CALL = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 2}<｜tool▁call▁end｜>'
OSS_CALL, OSS_FINAL = (
    ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
    "<|channel|>final<|message|>",
)
ANALYSIS = "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant"


def ended(end: str, *answers: str) -> list[str]:
    return [answer + end for answer in answers]


EXPECTED: dict[str, tuple[str, list[list[str] | str]]] = {
    "Llama 3": (
        HEADERS,
        [
            *(ended("<|eot_id|>", "four"), ended("<|eot_id|>", "four", "nine")),
            *(NO_TOOLS, NO_TOOLS, NO_TOOLS, NO_REASON, NO_REASON, NO_TOOLS),
        ],
    ),
    "Llama 3.1": (
        LLAMA,
        [
            *(ended("<|eot_id|>", "four"), ended("<|eot_id|>", "four", "nine")),
            *([LLAMA_CALL, "four<|eot_id|>"], [LLAMA_CALL, "four<|eot_id|>", "nine<|eot_id|>"]),
            *(f"{REFUSED}: one call", NO_REASON, NO_REASON, NO_REASON),
        ],
    ),
    "Qwen 2.5": (
        QWEN2,
        [
            *(ended("<|im_end|>", "four"), ended("<|im_end|>", "four", "nine")),
            *(ended("<|im_end|>", QWEN_CALL, "four"), ended("<|im_end|>", QWEN_CALL, "four", "nine")),
            *(ended("<|im_end|>", f"{QWEN_CALL}\n{QWEN_CALL}", "four"), NO_REASON, NO_REASON, NO_REASON),
        ],
    ),
    "Qwen 3": (
        QWEN3,
        [
            *(ended("<|im_end|>", "four"), ended("<|im_end|>", "four", "nine")),
            *(ended("<|im_end|>", QWEN_CALL, "four"), ended("<|im_end|>", QWEN_CALL, "four", "nine")),
            *(ended("<|im_end|>", f"{QWEN_CALL}\n{QWEN_CALL}", "four"), ended("<|im_end|>", THINK + "four")),
            ended("<|im_end|>", "four", THINK + "nine"),
            ended("<|im_end|>", THINK + QWEN_CALL, THINK + "four"),
        ],
    ),
    "Qwen 3.5": (
        QWEN35,
        [
            *(ended("<|im_end|>", "four"), ended("<|im_end|>", "four", "nine")),
            *(ended("<|im_end|>", QWEN_CALL, "four"), ended("<|im_end|>", QWEN_CALL, "four", "nine")),
            ended("<|im_end|>", f"{QWEN_CALL}\n{QWEN_CALL}", "four"),
            ended("<|im_end|>", THINK.removeprefix("<think>\n") + "four"),
            ended("<|im_end|>", "four", THINK.removeprefix("<think>\n") + "nine"),
            ended("<|im_end|>", *(THINK.removeprefix("<think>\n") + answer for answer in (QWEN_CALL, "four"))),
        ],
    ),
    "Mistral": (
        MISTRAL,
        [
            *(ended("</s>", "four"), ended("</s>", "four", "nine")),
            ended("</s>", f"[TOOL_CALLS][{MISTRAL_CALL}]", "four"),
            ended("</s>", f"[TOOL_CALLS][{MISTRAL_CALL}]", "four", "nine"),
            ended("</s>", f"[TOOL_CALLS][{MISTRAL_CALL}{MISTRAL_CALL}]", "four"),
            *(NO_REASON, NO_REASON, NO_REASON),
        ],
    ),
    "Gemma": (
        GEMMA,
        [
            *(ended("<end_of_turn>", "four"), ended("<end_of_turn>", "four", "nine")),
            *(f"{REFUSED}: roles", f"{REFUSED}: roles", f"{REFUSED}: roles", NO_REASON, NO_REASON, f"{REFUSED}: roles"),
        ],
    ),
    "DeepSeek V3": (
        DEEPSEEK,
        [
            *(ended("<｜end▁of▁sentence｜>", "four"), ended("<｜end▁of▁sentence｜>", "four", "nine")),
            ended("<｜end▁of▁sentence｜>", DEEPSEEK_CALL, "four"),
            ended("<｜end▁of▁sentence｜>", DEEPSEEK_CALL, "four", "nine"),
            *(ended("<｜end▁of▁sentence｜>", DEEPSEEK_CALL * 2, "four"), NO_REASON, NO_REASON, NO_REASON),
        ],
    ),
    "DeepSeek R1": (
        R1,
        [
            *(ended("<｜end▁of▁sentence｜>", "four"), ended("<｜end▁of▁sentence｜>", "four", "nine")),
            ended("<｜end▁of▁sentence｜>", DEEPSEEK_CALL, "four"),
            ended("<｜end▁of▁sentence｜>", DEEPSEEK_CALL, "four", "nine"),
            *(ended("<｜end▁of▁sentence｜>", DEEPSEEK_CALL * 2, "four"), NO_REASON, NO_REASON, NO_REASON),
        ],
    ),
    "gpt-oss": (
        GPT_OSS,
        [
            *([f"{OSS_FINAL}four<|return|>"], [f"{OSS_FINAL}four", f"{OSS_FINAL}nine<|return|>"]),
            [OSS_CALL, f"{OSS_FINAL}four<|return|>"],
            [OSS_CALL, f"{OSS_FINAL}four", f"{OSS_FINAL}nine<|return|>"],
            *(r"has tool_calls in message 1 .* leaves out", [f"{ANALYSIS}{OSS_FINAL}four<|return|>"]),
            [f"{OSS_FINAL}four", f"{ANALYSIS}{OSS_FINAL}nine<|return|>"],
            [OSS_CALL, f"{ANALYSIS}{OSS_FINAL}four<|return|>"],
        ],
    ),
    "Phi-3": (
        PHI,
        [
            *(ended("<|end|>", "four"), ended("<|end|>", "four", "nine")),
            *(NO_TOOLS, NO_TOOLS, NO_TOOLS, NO_REASON, NO_REASON, NO_TOOLS),
        ],
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, CHATML)
    return path


def counted(directory: Path, template: str, record: dict, loss_on: LossOn = "assistant") -> list[str] | str:
    """Return the texts that count, or what is wrong with the record."""
    (directory / "chat_template.jinja").write_text(template)
    chat = chat_of(load_tokenizer(str(directory)), loss_on, None)
    fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    (found,) = chat_tokens(str(directory / "tokenizer.json"), chat, [conversation_of(record, "chat")])
    if isinstance(found, RecordError):
        return str(found)
    return [fast.decode(found.ids[start:stop], skip_special_tokens=False) for start, stop in found.counted or []]


@pytest.mark.parametrize("model", EXPECTED)
def test_the_assistants_words_and_their_end_count_or_the_record_is_refused(directory: Path, model: str):
    template, expected = EXPECTED[model]
    for (name, record), wanted in zip(CHATS.items(), expected, strict=True):
        found = counted(directory, template, record)
        if isinstance(wanted, list):
            assert found == wanted, name
        else:
            assert isinstance(found, str), (name, found)
            assert pytest.RaisesExc(RecordError, match=wanted).matches(RecordError(found)), (name, found)


def test_the_last_answer_has_its_reasoning_where_earlier_ones_lose_it(directory: Path):
    record = CHATS["reasoning in turns"]
    assert counted(directory, QWEN3, record, "last") == [f"{THINK}nine<|im_end|>"]
    assert counted(directory, GPT_OSS, record, "last") == [f"{ANALYSIS}{OSS_FINAL}nine<|return|>"]
    assert counted(directory, QWEN3, CHATS["turns"], "last") == ["nine<|im_end|>"]


def test_words_of_earlier_turns_count_without_their_reasoning_where_the_template_drops_it(directory: Path):
    for content in ("<think>two and two</think>four", "<think>\ntwo and two\n</think>\n\nfour"):
        record = {"messages": [USER, FOUR | {"content": content}, AGAIN, NINE, AGAIN, NINE]}
        assert counted(directory, QWEN3, record) == ended("<|im_end|>", "four", "nine", "nine")
    emptied = QWEN35.replace("loop.index0 > question.last and", "").replace("+ thought +", "+ thought * loop.last +")
    emptied = emptied.replace("enable_thinking is defined", "false")
    assert "has reasoning in message 1" in counted(directory, emptied, CHATS["reasoning in turns"])


@pytest.mark.parametrize(
    "content", ["four<|im_end|>", "<|im_start|>assistant\nfour", "qxzjqxzj 75319086427531908642", "<"]
)
def test_words_that_look_like_the_template_do_not_move_the_boundaries_of_earlier_turns(directory: Path, content: str):
    record = {"messages": [USER, FOUR | {"content": content}, USER, FOUR | {"content": content}, USER, NINE]}
    for template in (QWEN3, QWEN35):
        assert counted(directory, template, record) == ended("<|im_end|>", content, content, "nine")


AFTER_WORDS = "'<|im_end|>\\n' }}\n{%- elif m.role == 'tool'"
UNCERTAIN = {
    "text before": (QWEN3, "{{- '<|im_start|>system", "{{- messages[1].content | length }}{{- '<|im_start|>system"),
    "text after": (QWEN3, "{%- if add_gen", "{{ messages[1].content | length }}{%- if add_gen"),
    "written twice": (QWEN3, "{{ words }}", "{{ words }}{{ words }}"),
    "cut": (QWEN3, "{{ words }}", "{{ words[:6] }}"),
    "another prompt": (QWEN3, "assistant\\n' }}{%- set thought", "assistant:\\n' }}{%- set thought"),
    "no end": (QWEN3, "{{ words }}", "{{ words }}{{ '.' if not loop.last else '' }}"),
    "other text for numbers": (QWEN3, "{{ words }}", "{{ words }}{{ '.' if words[0] == '7' else '' }}"),
    "other text for a word": (QWEN3, "{{ words }}", "{{ words }}{{ '.' if words[0] == 'q' else '' }}"),
    "other text after long answers": (
        *(QWEN3, AFTER_WORDS),
        AFTER_WORDS.replace("'<|im_end|>\\n'", "'<|im_end|>' + '\\n' * (m.content | length)"),
    ),
    "other text after short answers": (
        *(QWEN3, AFTER_WORDS),
        AFTER_WORDS.replace("'<|im_end|>\\n'", "'<|im_end|>' + '\\n' * (m.content | length < 6)"),
    ),
    "other text after long questions": (MISTRAL, "'[/INST]'", "'[/INST]' ~ m.content | length"),
    "a call with another end": (MISTRAL, "']' + eos_token", "']' + eos_token * loop.last"),
    "a call whose end depends on its name": (
        MISTRAL,
        "']' + eos_token",
        "']' * (call.function.name | length) + eos_token",
    ),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_an_earlier_turn_whose_surroundings_are_not_certain_is_refused(directory: Path, name: str):
    template, old, new = UNCERTAIN[name]
    assert old in template
    record = CHATS["tools, then turns" if template is MISTRAL else "turns"]
    found = counted(directory, template.replace(old, new), record)
    assert isinstance(found, str), found


def test_an_end_that_no_last_answer_has_does_not_count(directory: Path):
    """Ends as gpt-oss writes them. A model that learnt to write such a token would not stop."""
    template = QWEN3.replace("{{ words }}", "{{ words }}{{ '<|eot_id|>' if not loop.last else '' }}")
    assert counted(directory, template, CHATS["turns"]) == ["four", "nine<|im_end|>"]


def test_tools_that_a_template_moves_to_the_last_question_move_no_boundary(directory: Path):
    """Mistral does so, and also refuses an answer between a question and a tool's result."""
    raising = "{%- for m in messages -%}{%- if m.role == 'tool' and messages[loop.index0 - 1].content -%}"
    raising += "{{ raise_exception('no call') }}{%- endif -%}{%- endfor -%}"
    record = {"messages": [USER, CALLS, RESULT, CALLS, RESULT, FOUR, AGAIN, CALLS, RESULT, NINE], "tools": TOOLS}
    call = f"[TOOL_CALLS][{MISTRAL_CALL}]"
    for template in (MISTRAL, raising + MISTRAL):
        assert counted(directory, template, record) == ended("</s>", call, call, "four", call, "nine")


@pytest.mark.parametrize("content", ["ends with </think>", "ends with <|call|>\n", "<think><|end|>"])
def test_special_tokens_at_the_end_of_a_content_do_not_end_the_turn(directory: Path, content: str):
    record = {"messages": [USER, FOUR | {"content": content}]}
    assert counted(directory, GPT_OSS, record) == [f"{OSS_FINAL}{content}<|return|>"]
    assert counted(directory, PHI, record) == [f"{content}<|end|>"]
    assert counted(directory, CHATML, record) == [f"{content}<|im_end|>"]


def test_reasoning_inside_a_content_that_is_left_out_is_refused(directory: Path):
    record = {"messages": [USER, FOUR | {"content": "<think>two and two</think>four"}]}
    assert "has reasoning in message 1" in counted(directory, DEEPSEEK, record)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_read_by_any_of_its_names(directory: Path, name: str):
    for template, answer in ((QWEN3, THINK + "four<|im_end|>"), (GPT_OSS, f"{ANALYSIS}{OSS_FINAL}four<|return|>")):
        assert counted(directory, template, {"messages": [USER, FOUR | {name: "two and two"}]}) == [answer]


def test_a_message_that_the_template_leaves_out_is_refused(directory: Path):
    record = {"messages": [USER, FOUR, {"role": "tool", "content": "a result"}, NINE]}
    assert "has a message 2 (from 0, tool) that the chat template leaves out" in counted(directory, PHI, record)


def test_an_empty_list_of_calls_is_none(directory: Path):
    assert counted(directory, LLAMA, {"messages": [USER, FOUR | {"tool_calls": []}]}) == ["four<|eot_id|>"]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"loss": False}, {"training": False}])
def test_an_answer_that_is_not_to_be_learnt_does_not_count(directory: Path, flag: dict):
    record = {"messages": [USER, FOUR | flag, AGAIN, NINE | {name: 1 for name in flag}]}
    for template in (CHATML, MARKED):
        assert counted(directory, template, record) == ["nine<|im_end|>"]
    assert "has no token that counts" in counted(directory, CHATML, {"messages": [USER, FOUR | flag]})
    with pytest.raises(RecordError, match=r"the .* 0\.5; known are 0 and 1"):
        conversation_of({"messages": [USER, FOUR | {name: 0.5 for name in flag}]}, "chat")


def test_a_normaliser_that_joins_characters_over_a_boundary_is_refused(directory: Path, tmp_path: Path):
    fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.normalizer = tokenizers.normalizers.NFC()
    fast.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    record = {"messages": [USER, FOUR | {"content": "\u0301 is a"}]}
    assert "a token on both sides of a boundary" in counted(tmp_path, template, record)


def test_places_of_tokens_come_from_offsets_where_lengths_do_not_tell_them(directory: Path, tmp_path: Path):
    fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.normalizer = tokenizers.normalizers.Prepend("It is ")  # as Llama 2's, which prepends a blank
    fast.save(str(tmp_path / "tokenizer.json"))
    assert counted(tmp_path, CHATML, CHATS["turns"]) == [f"{word}<|im_end|>" for word in ("four", "nine")]


def test_templates_are_rendered_as_transformers_does(directory: Path):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% for m in messages %}  {% if m.x %}{% continue %}{% endif %}\n{{ [m, tools] | tojson(indent=2) }}"
    template += "{{ tools[0].items is callable }} {{ tools[0].none is undefined }}{{ m.role.none }}"
    template += "\n{% generation %}{{ strftime_now('%Y') }}\n {% endgeneration %}\n{% endfor %}{{ documents is none }}"
    messages = [USER, FOUR | {"x": 1}, NINE]
    tools = [tool | {"items": 1} for tool in TOOLS]
    ((expected,), _) = render_jinja_template([messages], tools, chat_template=template)
    given = {"messages": messages, "tools": tools, "documents": None}
    assert compiled(template, False).render(**given) == expected
    marked = compiled(template, True).render(**given)
    assert marked.count(START) == marked.count(STOP) == 2
    assert marked.replace(START, "").replace(STOP, "") == expected

"""Conversations in the shapes in which people store them, as the messages that chat templates read.

Imports nothing heavy, since every worker process of `prepare` imports this module.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, get_args

Format = Literal["text", "chat", "instruction", "preference"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Message = dict[str, Any]

ROLES: dict[str, str] = {role: role for role in get_args(Role)} | {  # as ShareGPT and others write them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
CONVERSATION_KEYS = ("messages", "conversations", "conversation")
TEXT_KEY = "text"  # unless another is stated
PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("instruction", "output"), ("instruction", "response"), ("query", "response"), ("problem", "solution")),
)
SYSTEM = ("system", "system_prompt")
FURTHER = ("tools", "input", "context", "label", *SYSTEM)  # read beside the keys of a format
TEXTS = (None, "text", "input_text", "output_text")  # types of a content's parts
KEPT = ("name", "tool_call_id")  # fields of a message besides those that are checked
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one field
LEARNT = ("train", "training", "loss", "weight")  # names of one flag of a message
ZEROS = "\0" * 8  # in a row: of a block that was never written, not of a text
HAS_ZEROS = "holds a run of zero bytes, as a damaged file does"


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, and the schemas of the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class RecordError(ValueError):
    """A record that is not what its format says. Its message continues a sentence that begins with the place."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Of a key that stands twice, Python would drop the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError(f'has the key "{next(key for key in keys if keys.count(key) > 1):.40}" twice in one object')
    return found


JSON_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # of records


def record_of(value: object) -> object:
    """Return a JSON value as a record: messages without a key around them become `{"messages": ...}`."""
    is_list = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
    return {"messages": value} if is_list else value


def is_message(value: object) -> bool:
    """Return True if a JSON value is a message, by its keys."""
    roles, contents = ("role", "from"), ("content", "value", "tool_calls")
    return isinstance(value, dict) and any(key in value for key in roles) and any(key in value for key in contents)


def format_of(names: Collection[str], text_key: str) -> Format | None:
    """Return the format of a record with these keys or columns; None if they fit none."""
    if any(key in names for key in CONVERSATION_KEYS):
        return "chat"
    if "chosen" in names and "rejected" in names:
        return "preference"
    if text_key in names:
        return "text"
    if any(set(pair) <= set(names) for pair in PAIRS):
        return "instruction"
    return None


def columns_of(kind: Format, names: Collection[str], text_key: str) -> list[str]:
    """Return the keys or columns that a format reads, of those that are there."""
    wanted = {
        "text": (text_key,),
        "chat": (*_chat_keys(text_key), "tools", *SYSTEM),
        "instruction": tuple(name for pair in PAIRS for name in pair) + FURTHER,
        "preference": ("prompt", "chosen", *FURTHER),
    }[kind]
    return [name for name in names if name in wanted]


def conversation_of(record: Mapping[str, Any], kind: Format, key: str = TEXT_KEY) -> Conversation:
    """Return the conversation that a record holds.

    Args:
        record: the record's keys or columns.
        kind: chat, instruction or preference. Of a preference, the chosen answer is taken.
        key: key or column of a chat's messages, if it is none of the known ones.

    Raises:
        RecordError: if the record is of another format, has an unknown role, or no answer at its end.
    """
    if kind == "chat":
        messages = _chat(record, _chat_keys(key))
    else:
        messages = _instruction(record) if kind == "instruction" else _preference(record)
    system = next(filter(None, (_string_if_any(record, name) for name in SYSTEM)), "")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if messages[-1]["role"] != "assistant":
        raise RecordError(f"ends with a message of the {messages[-1]['role']}, so there is no answer to learn")
    return Conversation(messages, _tools(record.get("tools")))


def _chat_keys(key: str) -> tuple[str, ...]:
    return CONVERSATION_KEYS if key == TEXT_KEY else (key, *CONVERSATION_KEYS)


def _chat(record: Mapping[str, Any], keys: tuple[str, ...]) -> list[Message]:
    for key in keys:
        if record.get(key) is not None:
            return _messages(record[key], key)
    raise RecordError(f"has none of the keys {', '.join(keys)}; it has {_names(record)}")


def _instruction(record: Mapping[str, Any]) -> list[Message]:
    if record.get("label") is False:  # of an unpaired preference
        raise RecordError('has the "label" false, so its answer is not to be learnt')
    for question, answer in PAIRS:
        asked, answered = record.get(question), record.get(answer)
        if asked is None or answered is None:
            continue
        if isinstance(asked, list) or isinstance(answered, list):
            return [*_turn(asked, question, "user"), *_turn(answered, answer, "assistant")]
        further = _string_if_any(record, "input")
        if not further and question == "instruction":  # Dolly's; beside a question, it is often what answers it
            further = _string_if_any(record, "context")
        asked = f"{asked}\n\n{further}" if further else asked
        return [*_turn(asked, question, "user"), *_turn(answered, answer, "assistant")]
    pairs = " or ".join("/".join(pair) for pair in PAIRS)
    raise RecordError(f"has no pair of keys {pairs}; it has {_names(record)}")


def _preference(record: Mapping[str, Any]) -> list[Message]:
    chosen = record.get("chosen")
    if chosen is None:
        raise RecordError(f'has no key "chosen"; it has {_names(record)}')
    before = record.get("prompt")
    if isinstance(chosen, str) and before is None:
        raise RecordError('has a "chosen" that is a string, and no key "prompt" for what was asked')
    answer = _turn(chosen, "chosen", "assistant")
    asked = [] if before is None else _turn(before, "prompt", "user")
    if answer[: len(asked)] == asked:
        return answer
    if asked[-1] in answer:
        raise RecordError('has a "chosen" that repeats the end of "prompt", but not all of it')
    return [*asked, *answer]


def _turn(value: Any, key: str, role: Role) -> list[Message]:
    """Return the messages of a field that holds either a text or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, key)


def _messages(value: Any, key: str) -> list[Message]:
    if isinstance(value, str):  # JSON in a column of text
        value = _decoded(value, key)
    if isinstance(value, Mapping) and value and all(isinstance(entry, list) for entry in value.values()):
        columns = zip_longest(*value.values())  # as `datasets` stores a sequence of objects
        value = [dict(zip(value, row, strict=True)) for row in columns]
    if not isinstance(value, list):
        raise RecordError(f'has a "{key}" of type {type(value).__name__}, not a text or a list of messages')
    if not value:
        raise RecordError(f'has a "{key}" without messages')
    return [_message(entry, f'"{key}"[{i}]') for i, entry in enumerate(value)]


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise RecordError(f"has a {where} that is not an object")
    named, content = _first(entry, ("role", "from")), _first(entry, ("content", "value"))
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise RecordError(f"has in {where} the role {named!r:.40}; known are {', '.join(ROLES)}")
    if entry.get("function_call") is not None:
        raise RecordError(f"has in {where} a function_call, which templates do not read: write it as tool_calls")
    further = {name: entry[name] for name in KEPT if entry.get(name) is not None}
    calls = entry.get("tool_calls")
    if named == "function_call":  # ShareGPT's, of which the text is the call
        functions = _decoded(content, where) if isinstance(content, str) else content
        functions = functions if isinstance(functions, list) else [functions]
        content, calls = None, [{"type": "function", "function": function} for function in functions]
    if calls:
        further["tool_calls"] = _calls(calls, where)
    if reasoning := _first(entry, REASONING):
        if not isinstance(reasoning, str):
            raise RecordError(f"has in {where} a reasoning of type {type(reasoning).__name__}, not a string")
        further |= {"reasoning_content": reasoning, "thinking": reasoning}  # templates read one or the other
    if not _is_learnt(entry, where):
        further["train"] = False
    return {"role": role, "content": _text(content, where, bool(calls or reasoning)), **further}


def _first(entry: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first value under these names that is not null."""
    for name in names:  # several times as fast as a generator
        if (value := entry.get(name)) is not None:
            return value
    return None


def _is_learnt(entry: Mapping[str, Any], where: str) -> bool:
    """Return False for an answer that is not to be learnt."""
    flags = {name: entry[name] for name in LEARNT if entry.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):  # as are false and true
            raise RecordError(f"has in {where} the {name} {value!r:.40}; known are 0 and 1, false and true")
    return all(flags.values())


def _text(content: Any, where: str, may_be_absent: bool) -> str:
    """Return the text of a message. Parts of type text are joined; other parts, such as images, are refused."""
    if content is None and may_be_absent:
        return ""
    if isinstance(content, list):
        known = [isinstance(part, Mapping) and part.get("type") in TEXTS for part in content]
        parts = [part.get("text") for part, is_text in zip(content, known, strict=True) if is_text]
        if all(known) and all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        raise RecordError(f"has in {where} a content with parts other than text")
    if not isinstance(content, str):
        raise RecordError(f"has in {where} a content of type {type(content).__name__}, not a string")
    return content


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = _decoded(calls, f"{where}.tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RecordError(f"has in {where} tool_calls that are not a list of objects")
    return [_call(call, where) for call in calls]


def called(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the function of a tool or a tool call, which may stand in a wrapper or not."""
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as templates read them; OpenAI writes them as JSON text."""
    function = called(call)
    if not isinstance(function.get("name"), str):
        raise RecordError(f"has in {where} a tool call without a name")
    arguments = function.get("arguments") or "{}"  # none are an empty object
    if isinstance(arguments, str):
        arguments = _decoded(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RecordError(f"has in {where}.arguments a value of type {type(arguments).__name__}, not an object")
    decoded = {**function, "arguments": arguments}
    return decoded if function is call else {**call, "function": decoded}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _decoded(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError('has "tools" that are not a list of objects')
    return [dict(tool) for tool in tools]


def _string_if_any(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError(f'has under "{key}" a value of type {type(value).__name__}, not a string')
    return value or ""


def _decoded(text: str, key: str) -> Any:
    try:
        return JSON_DECODER.decode(text)
    except RecordError:
        raise
    except (ValueError, RecursionError):
        raise RecordError(f"has in {key} a text that is not JSON") from None


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}{' = null' * (value is None)}" for name, value in list(record.items())[:5]) or "none"

"""Chat templates with the structure of well-known models', and tokenizers that know their special tokens."""

import json
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
HEADERS = """\
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
BRACKETS = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' -%}{{ m.content + eos_token }}
{%- else -%}{{ raise_exception('only user and assistant may speak') }}{%- endif -%}
{%- endfor -%}"""
TURNS = """\
{{- bos_token -}}
{%- for m in messages -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
MARKED = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}"""
LLAMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system, messages = messages[0].content | trim, messages[1:] -%}
{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + (system or '') + '<|eot_id|>' }}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- elif 'tool_calls' in m -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one call at a time') }}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- else -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools -%}{{ tools | tojson + '\\n\\n' }}{%- endif -%}
{{ m.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
QWEN_CALLS = """\
{%- for call in m.tool_calls or [] -%}
{{ '\\n' if m.content or not loop.first else '' }}{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}"""
QWEN_FRAME = """\
{{- '<|im_start|>system\\n' }}{{ messages[0].content if messages[0].role == 'system' else 'Be helpful.' }}
{{- '\\n' + tools | tojson if tools else '' }}{{ '<|im_end|>\\n' }}
{%- set question = namespace(last=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set question.last = messages.index(m) -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}{{ '<|im_start|>assistant\\n' }}ANSWER
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}PROMPT{%- endif -%}"""
THINKING = """\
{%- set thought, words = m.reasoning_content or '', m.content -%}
{%- if '</think>' in words -%}
{%- set thought = words.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set words = words.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > question.last and SHOWN -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}
{{ words }}"""
QWEN2 = QWEN_FRAME.replace("ANSWER", "{{ m.content }}" + QWEN_CALLS).replace("PROMPT", "")
QWEN3 = QWEN_FRAME.replace("ANSWER", THINKING.replace("SHOWN", "(loop.last or thought)") + QWEN_CALLS).replace(
    "PROMPT", "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '' }}"
)
QWEN35 = QWEN_FRAME.replace("ANSWER", THINKING.replace("SHOWN", "true") + QWEN_CALLS).replace(
    "PROMPT",
    "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}",
)
MISTRAL = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and m == asked[-1] else '' }}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined -%}
[TOOL_CALLS][
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{ raise_exception('an id has 9 characters') }}{%- endif -%}
{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
{%- endfor -%}
{{ ']' + eos_token }}
{%- elif m.role == 'assistant' -%}{{ m.content + eos_token }}
{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS]{"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{%- endif -%}
{%- endfor -%}"""
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set before, messages = messages[0].content + '\\n\\n', messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- before or '' if loop.first else '' }}{{ m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
DEEPSEEK = """\
{{- bos_token -}}
{%- for m in messages if m.role == 'system' -%}{{ m.content }}{%- endfor -%}
{{ tools | tojson if tools else '' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' -%}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.role == 'assistant' -%}
{%- if loop.previtem.role == 'user' -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}
{{ m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] -%}
{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor -%}
{{ '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role == 'user' -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}"""
R1 = DEEPSEEK.replace(
    "<｜Assistant｜></think>' }}{%- endif -%}\n{{ m", "<｜Assistant｜>' }}{%- endif -%}\n{{ m"
).replace("</think>' }}{%- endif -%}", "<think>\\n' }}{%- endif -%}")
GPT_OSS = """\
{{- '<|start|>system<|message|>Today is ' + strftime_now('%A') + '<|end|>' -}}
{%- if messages[0].role in ('system', 'developer') -%}
{%- set given, messages = messages[0].content, messages[1:] -%}
{%- endif -%}
{%- if given or tools -%}
{{ '<|start|>developer<|message|>' + (given or '') + (tools | tojson if tools else '') + '<|end|>' }}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | list -%}
{%- if m.thinking and (not later if m.tool_calls else loop.last and not add_generation_prompt) -%}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif -%}
{%- if m.tool_calls -%}
{%- set call = m.tool_calls[0].function -%}
{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- endif -%}
{%- elif m.role == 'tool' -%}
{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""
PHI = """\
{%- for m in messages -%}
{%- if m.role != 'tool' -%}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endif -%}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}"""
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|channel|>", "<|message|>"),
    *("<|return|>", "<|end|>", "<|call|>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<｜User｜>", "<｜Assistant｜>"),
    *(
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    *("<｜end▁of▁sentence｜>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|user|>", "<|assistant|>"),
    "<|system|>",
)
SWALLOWING = tokenizers.AddedToken("<|end|>", rstrip=True)  # takes up the blanks behind it, as Phi-3's tokens do
LINE_BREAK = tokenizers.AddedToken("\n", special=False, normalized=False)  # as Gemma has


def write_tokenizer(
    directory: Path, template: str | list | None, tokens: tuple[tokenizers.AddedToken, ...] = ()
) -> str:
    """Write a byte-level BPE tokenizer with all special tokens, and a template beside it. Return the path.

    Args:
        directory: where to write.
        template: text of a chat template, or several by name.
        tokens: tokens to add, or to take the place of special ones.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    others = [token.content for token in tokens]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*tokens, *(token for token in SPECIAL if token not in others)],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is the answer? The answer is four, and not five. " * 20], trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    saved.save_pretrained(directory)
    if template is not None:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return str(directory)

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
FORGETFUL = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last -%}
{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""  # without earlier reasoning
MARKED = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}"""
CHANNELS = """\
{%- for m in messages -%}
{{ '<|start|>' + m.role }}
{%- if m.role == 'assistant' -%}{{ '<|channel|>final' }}{%- endif -%}
{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|channel|>", "<|message|>"),
    *("<|return|>", "<|end|>"),
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

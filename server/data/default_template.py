"""The chat template of models that bring none: one line a message, the end-of-sequence token ending an answer.

`start` is what the tokenizer puts before every text. The marks give the loss mask: an answer and its end.
"""

DEFAULT_TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content or [] -%}{{- part.text or '' -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- start -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}{{- ' ' ~ words(message.content) ~ (eos_token or '') -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message.role == 'user' -%}
{{- 'User: ' ~ words(message.content) ~ '\\n' -}}
{%- elif message.role in ('system', 'developer') -%}
{{- 'System: ' ~ words(message.content) ~ '\\n' -}}
{%- else -%}
{{- raise_exception('the default chat template knows the roles system, user and assistant, not ' ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

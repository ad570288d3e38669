"""Llama 3's chat template, with audio where NatureLM-audio was trained to hear it."""

import json

from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import AUDIO_LEAD

# What both templates read of a message: its parts (a string is one text part), all its text, and how many slots and
# audios it has. A message whose text has slots gets its audios there, in order; in another one every audio part becomes
# a slot where it stands, set as NatureLM-audio sets it.
_PARTS = (
    "{%- set content = message['content'] %}"
    "{%- set parts = [{'type': 'text', 'text': content | trim}] if content is string else content or [] %}"
    "{%- set texts = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{%- set slots = texts.count('SLOT') %}"
    "{%- set audios = parts | selectattr('type', 'equalto', 'audio') | list | length %}"
)
_MESSAGES = (
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + ROLE + '<|end_header_id|>\n\n' }}"
    f"{_PARTS}"
    "BEFORE"
    "{%- for part in parts %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- elif part['type'] == 'audio' and not slots %}{{- 'LEAD' }}"
    "{%- endif %}"
    "{%- endfor %}AFTER{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

# Functions that the model may call are told as Llama 3.1's own template tells them: in the first words of the user's,
# behind a system turn that says where results come from. A call is an answer of JSON, which vLLM reads with its parser
# "llama3_json"; what it returned is a turn of its own. Without functions nothing of this is there.
_ROLE = "('ipython' if message['role'] == 'tool' else message['role'])"
_ENVIRONMENT = "Environment: ipython\n"
_FUNCTIONS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)
_BEFORE_CONVERSATION = (
    "{%- set told = namespace(functions=not tools) %}"
    "{%- if tools and (not messages or messages[0]['role'] != 'system') %}"
    f"{{{{- '<|start_header_id|>system<|end_header_id|>\n\n{_ENVIRONMENT}<|eot_id|>' }}}}"
    "{%- endif %}"
)
_BEFORE_PARTS = (
    "{%- if tools and loop.first and message['role'] == 'system' %}"
    f"{{{{- '{_ENVIRONMENT}\n' }}}}"
    "{%- elif not told.functions and message['role'] == 'user' %}"
    "{%- set told.functions = true %}"
    f"{{{{- '{_FUNCTIONS}' }}}}"
    "{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\n\n' }}{%- endfor %}"
    "{%- endif %}"
)
_AFTER_PARTS = (
    "{%- for call in message['tool_calls'] or [] %}"
    "{%- set arguments = call['function']['arguments'] %}"
    "{{- '{\"name\": ' + (call['function']['name'] | tojson) + ', \"parameters\": ' }}"
    "{{- arguments if arguments is string else arguments | tojson }}{{- '}' }}"
    "{%- endfor %}"
)

# Slots and audios are counted over the whole conversation: vLLM itself counts them only where there is an audio.
_CHECKS = (
    "{%- set total = namespace(slots=0, audios=0) %}"
    "{%- for message in messages %}"
    f"{_PARTS}"
    "{%- if PLACEHOLDER in texts %}"
    "{{- raise_exception('the prompt writes the audio placeholder token itself; write SLOT instead') }}"
    "{%- endif %}"
    "{%- set total.slots = total.slots + (slots or audios) %}"
    "{%- set total.audios = total.audios + audios %}"
    "{%- endfor %}"
    "{%- if total.slots != total.audios %}"
    "{{- raise_exception('audio slots (SLOT) in the prompt: ' ~ total.slots ~ ', audios given: ' ~ total.audios) }}"
    "{%- endif %}"
)


def processor_chat_template() -> str:
    """The Jinja template of the processor, which is given the audios of slots in text beside the messages."""
    return _messages("message['role']")


def server_chat_template(placeholder: str) -> str:
    """The Jinja template of the server: with BOS and functions to call, and refusing what does not fit together.

    Slots that are not as many as the audios are refused, and so is the text of the token that stands for audio in
    ``input_ids``, the ``placeholder``.
    """
    checks = _CHECKS.replace("SLOT", AUDIO_SLOT).replace("PLACEHOLDER", json.dumps(placeholder))
    messages = _messages(_ROLE, before=_BEFORE_PARTS, after=_AFTER_PARTS)
    return "{{- bos_token }}" + checks + _BEFORE_CONVERSATION + messages


def _messages(role: str, *, before: str = "", after: str = "") -> str:
    """The template of a conversation, with expressions for a turn's role, and for what stands around its parts."""
    around = _MESSAGES.replace("ROLE", role).replace("BEFORE", before).replace("AFTER", after)
    return around.replace("LEAD", AUDIO_LEAD).replace("SLOT", AUDIO_SLOT)

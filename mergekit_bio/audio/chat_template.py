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
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    f"{_PARTS}"
    "{%- for part in parts %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- elif part['type'] == 'audio' and not slots %}{{- 'LEAD' }}"
    "{%- endif %}"
    "{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
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
    return _MESSAGES.replace("LEAD", AUDIO_LEAD).replace("SLOT", AUDIO_SLOT)


def server_chat_template(placeholder: str) -> str:
    """The Jinja template of the server: with BOS, and refusing what does not fit together.

    Slots that are not as many as the audios are refused, and so is the text of the token that stands for audio in
    ``input_ids``, the ``placeholder``.
    """
    checks = _CHECKS.replace("SLOT", AUDIO_SLOT).replace("PLACEHOLDER", json.dumps(placeholder))
    return "{{- bos_token }}" + checks + processor_chat_template()

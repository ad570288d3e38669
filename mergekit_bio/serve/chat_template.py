"""The server's chat template: Llama 3's headers, with audio where NatureLM-audio was trained to hear it."""

import json

from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import AUDIO_LEAD

# A string content is one text part. Slots and audios are counted over the whole conversation: vLLM itself counts them
# only where there is an audio.
_TEMPLATE = (
    "{{- bos_token }}"
    "{%- set found = namespace(slots=0, audios=0) %}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- set content = message['content'] %}"
    "{%- set parts = [{'type': 'text', 'text': content | trim}] if content is string else content or [] %}"
    "{%- set texts = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{%- if PLACEHOLDER in texts %}"
    "{{- raise_exception('the prompt writes the audio placeholder token itself; write SLOT instead') }}"
    "{%- endif %}"
    "{%- set slots = texts.count('SLOT') %}"
    "{%- set audios = parts | selectattr('type', 'equalto', 'audio') | list | length %}"
    "{%- set found.slots = found.slots + (slots or audios) %}"
    "{%- set found.audios = found.audios + audios %}"
    "{%- for part in parts %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- elif part['type'] == 'audio' and not slots %}{{- 'LEAD' }}"
    "{%- endif %}"
    "{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if found.slots != found.audios %}"
    "{{- raise_exception('audio slots (SLOT) in the prompt: ' ~ found.slots ~ ', audios given: ' ~ found.audios) }}"
    "{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def chat_template(placeholder: str) -> str:
    """The Jinja template.

    A message whose text has slots of its own gets its audios there, in order; in another one every audio part becomes
    a slot where it stands, set as NatureLM-audio sets it. Slots that are not as many as the audios are refused, and
    so is the placeholder.

    Args:
        placeholder: The text of the token that stands for audio in ``input_ids``.
    """
    quoted = json.dumps(placeholder)
    return _TEMPLATE.replace("LEAD", AUDIO_LEAD).replace("SLOT", AUDIO_SLOT).replace("PLACEHOLDER", quoted)

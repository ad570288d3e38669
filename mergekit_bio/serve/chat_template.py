"""The server's chat template: Llama 3's headers, with audio where NatureLM-audio was trained to hear it."""

from mergekit_bio.model.layout import AUDIO_SLOT
from mergekit_bio.model.prompt import AUDIO_LEAD

#: A message whose text has slots of its own gets its audios there, in order; in another one every audio part becomes
#: a slot where it stands, set as NatureLM-audio sets it.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- elif message['content'] %}"
    "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- elif part['type'] == 'audio' and '" + AUDIO_SLOT + "' not in texts %}{{- '" + AUDIO_LEAD + "' }}"
    "{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

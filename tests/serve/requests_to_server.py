"""What tests send to the server."""

import base64
import io

import numpy as np
import soundfile

#: vLLM's own, and those of a file.
KEY = "the-key"
KEYS = {"ana": "0a1b2c3d", "ben": "4e5f6a7b"}
MAX_AUDIOS, MAX_NEW_TOKENS = 6, 16


def encoded(samples: np.ndarray, kind: str = "wav") -> str:
    """Samples as a base64 file."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format=kind.upper())
    return base64.b64encode(file.getvalue()).decode()

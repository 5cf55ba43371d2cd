"""Keys stay out of what is written: messages, journals, answers, reports.

A service may repeat the key that it refuses, and a library may put it into an exception.
"""

import os

# Variables of the environment that hold keys, ours and those that libraries below look at.
KEYS = (
    *("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY"),
)
SHORTEST = 8  # characters of a key; a shorter value may be a word that texts hold anyway


def redact(text: str) -> str:
    """The text without the values of `KEYS`: `[GEMINI_API_KEY]` in the place of each."""
    for name in KEYS:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST and value in text:
            text = text.replace(value, f"[{name}]")
    return text

"""Tasks that come with autocomp, by name: each a function that returns a `Task` and takes ``progress``."""

from __future__ import annotations

BUILT_IN = {
    "digits": "autocomp.tasks.digits:load_digits_task",
    "digits-mobile": "autocomp.tasks.mobilenet:load_digits_mobile_task",
    "speech": "autocomp.tasks.speech.task:load_speech_task",
    "tokens": "autocomp.tasks.tokens:load_tokens_task",
}

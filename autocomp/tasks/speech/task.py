"""The built-in task ``speech``: letters of the radio alphabet and digits, spoken, are written down by a small Conformer.

Data: espeak-ng's voices, and recordings of people where `fetch` has been run. Splits are by speaker (`voices`). The model comes trained
(`trained`). The page docs/speech.md has the figures.
"""

from __future__ import annotations

from functools import partial

from autocomp.progress import Progress
from autocomp.tasks.speech.batches import Augmentation, SpeechBatches
from autocomp.tasks.speech.corpus import COUNTS, held_out
from autocomp.tasks.speech.metrics import ctc_loss, error_rates
from autocomp.tasks.speech.trained import load
from autocomp.tasks.task import Task

CALIBRATION_BATCHES = 4
CALIBRATION_BATCH = 64
UNMASKED = Augmentation(masks=False)
UTTERANCES = 2000  # synthetic ones to train compressed models with; ten seconds to make, once
BATCH, EPOCH = 32, 60  # what is a pass through the training data is our choice: every utterance is drawn anew


def load_speech_task(progress: Progress | None = None) -> Task:
    """Return the task. Voices are synthesised first, where the cache does not have them (half a minute).

    UsageError if the packages of the extra ``speech`` are not installed.
    """
    progress = progress or Progress()
    validation, test = (held_out(split, COUNTS, progress) for split in ("validation", "test"))
    calibration = SpeechBatches(
        2 * CALIBRATION_BATCH, CALIBRATION_BATCH, CALIBRATION_BATCHES, seed=1, augmentation=UNMASKED
    )
    inputs = [inputs for inputs, _ in calibration]
    return Task(
        model=load(),
        example_inputs=(inputs[0][0][:1].clone(),),
        calibration=inputs,
        evaluate=partial(error_rates, split=validation),
        test=partial(error_rates, split=test),
        train=SpeechBatches(UTTERANCES, BATCH, EPOCH, seed=2),
        loss=ctc_loss,
        objective="cer",
        higher_is_better=False,
        unit="%",
        outputs="classes@2",
        name="speech",
        description=(
            "Letters of the radio alphabet and digits, one to five in two seconds of 8 kHz audio, written down by a Conformer with a CTC head; "
            f"{validation.described()}; each without noise, and with noise at 10 and 0 dB"
        ),
    )

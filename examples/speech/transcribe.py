"""Write down what a recording says, with what `autocomp search speech` delivered.

    python examples/speech/transcribe.py RUN/models/ID recording.wav [--onnx] [--decoding words] [--expect "nine alpha"]

The recording is a mono WAV file of 16 bits or floats; rates above 8 kHz are converted, lower ones refused. Several folders of models of
other lengths may be given: the shortest that holds the recording is run. A longer recording is cut into windows that overlap. What was
heard goes to the output, what it took to the error output.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from delivered import opened

from autocomp.errors import AutocompError, UsageError
from autocomp.tasks.speech.audio import read_wav
from autocomp.tasks.speech.decoding import DECODERS
from autocomp.tasks.speech.runner import Heard, transcribe
from autocomp.tasks.speech.words import encoded


def heard(options: argparse.Namespace) -> Heard:
    if options.expect is not None:
        encoded(options.expect)  # refuses what is outside the vocabulary before anything is run
        if find_spec("jiwer") is None:
            raise UsageError("error rates are counted by jiwer, which is not installed: pip install 'autocomp[speech]'")
    audio = read_wav(options.recording, any_rate=True)
    begun = time.perf_counter()
    modules = [opened(folder, options.onnx) for folder in options.models]
    print(f"{len(modules)} model(s) opened in {1e3 * (time.perf_counter() - begun):.0f} ms", file=sys.stderr)
    return transcribe(audio, modules, DECODERS[options.decoding])


def told(found: Heard) -> str:
    return (
        f"{found.audio:.2f} s of audio in {found.windows} window(s) of {found.window:g} s: first result after {1e3 * found.first:.1f} ms, "
        f"all after {1e3 * found.work:.1f} ms, real-time factor {found.real_time_factor:.4f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders RUN/models/ID")
    parser.add_argument("recording", type=Path, help="a WAV file")
    parser.add_argument("--onnx", action="store_true", help="run model.onnx in place of model.so")
    parser.add_argument("--decoding", choices=list(DECODERS), default="greedy")
    parser.add_argument("--expect", metavar="TEXT", help="what was said: error rates are printed, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        found = heard(options)
    except AutocompError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(found.text)
    print(told(found), file=sys.stderr)
    if options.expect is not None:
        import jiwer

        rates = jiwer.cer(options.expect, found.text), jiwer.wer(options.expect, found.text)
        print("CER {:.1%}, WER {:.1%}".format(*rates), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

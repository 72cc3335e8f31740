"""A dozen of the corpus, of every kind: analysed, compiled, equal to torch on inputs nobody has seen; some searched and read back.

The whole corpus is `python benchmarks/model_coverage.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import CORPUS
from corpus.stages import STAGES, Budget

# One or two of a kind, from all three libraries, each with something the others lack.
DOZEN = (
    "timm/resnet10t",  # BatchNorm with its activation inside
    "timm/test_nfnet",  # weights standardised in every call
    "timm/mobileone_s0",  # branches added before the activation
    "torchvision/shufflenet_v2_x0_5",  # channels shuffled between halves
    "torchvision/swin",  # windows rolled and masked, biases looked up
    "torchvision/deeplabv3_mobilenet_v3_large",  # a dictionary of maps, upsampled
    "torchvision/r3d",  # three axes of space
    "transformers/distilbert",  # a dataclass returned, a mask read
    "transformers/gpt2",  # weights the other way round, tied to the embedding
    "transformers/qwen3_cached",  # rotary, grouped queries, norms of heads, keys and values as inputs and outputs
    "transformers/wav2vec2_stable",  # a waveform, weight norm
    "transformers/detr",  # a decoder of queries, boxes
)
SEARCHED = ("timm/resnet10t", "transformers/distilbert")
MORE = 1.05  # times the multiplications that were counted: what reads a constant of the model's (queries of boxes) is counted for each sample
# transformers warns of arguments that it will rename
pytestmark = [pytest.mark.corpus, pytest.mark.filterwarnings("ignore::FutureWarning")]
BUDGET = Budget(tiles=1, trials=6, measurements=1, minutes=1.0)


@pytest.fixture(scope="module", autouse=True)
def _first_tiles() -> Iterator[None]:
    """The stages set how many tiles are tried, in a process of their own; here it is put back."""
    from autocomp.tuning.tune import Tuner

    before = dict(Tuner.__init__.__kwdefaults__)
    yield
    Tuner.__init__.__kwdefaults__.update(before)


@pytest.mark.parametrize("name", DOZEN)
def test_equal_and_compressible(name: str, tmp_path: Path) -> None:
    entry = CORPUS[name]
    total = STAGES["build"](entry, BUDGET, tmp_path)
    assert total["spread"] > 0.01, "outputs that do not depend on the inputs prove nothing"
    found = STAGES["analyse"](entry, BUDGET, tmp_path)
    assert 0 < found["prunable"] <= found["macs"] <= MORE * total["weights"]
    assert found["quantisable"] >= 0.9 * total["weights"]
    verdict = STAGES["compile"](entry, BUDGET, tmp_path)
    assert verdict["equal"], verdict["why"]


@pytest.mark.parametrize("name", SEARCHED)
def test_search_and_read_back(name: str, tmp_path: Path) -> None:
    found = STAGES["search"](CORPUS[name], BUDGET, tmp_path)
    assert found["points"] >= 1
    assert found["report"]
    back = STAGES["reload"](CORPUS[name], BUDGET, tmp_path)
    assert back["silently_wrong"] == 0
    assert back["ok"] == found["points"], back["points"]

"""The built-in task ``tokens``: its text, splits, slices and model. Small pieces stand for the whole training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from autocomp.compiler.build import build
from autocomp.devices.local import LocalDevice
from autocomp.errors import UsageError
from autocomp.tasks import stdlib_text, tokens
from autocomp.tasks.task import evaluate_task

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text() -> tuple[stdlib_text.Text, stdlib_text.Text, stdlib_text.Text, str]:
    return stdlib_text.load_text()


def windows_of(part: stdlib_text.Text) -> set[bytes]:
    return {row.numpy().tobytes() for row in part.windows(part.starts)[0]}


def test_splits_are_large_and_hold_no_common_text(text) -> None:
    training, validation, test, _ = text
    known = windows_of(training)
    for part in (validation, test):
        tokens_, roles = tokens.held_out(part)
        assert tokens_.shape == roles.shape == (tokens.HELD_OUT, stdlib_text.LENGTH)
        assert int(tokens_.min()) >= 0
        assert int(tokens_.max()) < stdlib_text.VOCABULARY
        assert set(roles.flatten().tolist()) == set(range(len(stdlib_text.ROLES)))
        held_out = windows_of(part)
        assert len(held_out & known) < 0.005 * len(held_out)  # several files begin with the same licence
    assert len(training.starts) > 5 * len(validation.starts)


def test_text_is_the_same_every_time(text) -> None:
    again = stdlib_text.load_text()
    assert again[3] == text[3]
    for one, other in zip(again[:3], text[:3], strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.roles, other.roles)


def test_every_kind_of_token_is_given_its_role(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        'def readLine(size=12):  # "why"\n    """Say it."""\n    return self.file.read(limit=size, x="a")\n'
    )
    words, roles = stdlib_text.tagged(source)
    named = list(zip(words, (stdlib_text.ROLES[role] for role in roles), strict=True))
    assert named[:9] == [
        ("def", "keyword"), ("read", "definition"), ("line", "definition"), ("(", "sign"), ("size", "argument"),
        ("=", "sign"), ("1", "number"), ("2", "number"), (")", "sign"),
    ]  # fmt: skip
    expected = {"why": "comment", "say": "docstring", "return": "keyword", "self": "name", "file": "attribute"}
    expected |= {"limit": "argument", "x": "argument", "a": "string", "\n": "sign"}
    assert {word: role for word, role in named if word in expected} == expected
    assert ("read", "method") in named[9:]


def test_a_name_called_is_a_call(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text("x = open(y)\n")
    words, roles = stdlib_text.tagged(source)
    found = dict(zip(words, (stdlib_text.ROLES[role] for role in roles), strict=True))
    assert [found[word] for word in ("x", "open", "y")] == ["name", "call", "name"]


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match=r"holds only 0 of its .py files.*ships its standard library"):
        stdlib_text.load_text()


def test_batches_can_be_gone_through_again_and_repeat_with_their_seed(text) -> None:
    first, second = tokens.TokenBatches(text[0], 16, seed=1), tokens.TokenBatches(text[0], 16, seed=1)
    one, two, again = list(first), list(first), list(second)
    assert len(one) == len(first) == tokens.EPOCH
    assert torch.equal(one[0][0][0], again[0][0][0])
    assert not torch.equal(one[0][0][0], two[0][0][0])
    (window,), roles = one[0]
    assert window.shape == roles.shape == (16, stdlib_text.LENGTH)
    logits = torch.zeros(16, stdlib_text.LENGTH, len(stdlib_text.ROLES))
    assert float(tokens.tagging_loss(logits, roles)) == pytest.approx(np.log(len(stdlib_text.ROLES)), rel=1e-5)


def test_slices_make_up_the_whole(text) -> None:
    torch.manual_seed(0)
    windows = tuple(part[:40] for part in tokens.held_out(text[1]))
    found = tokens.accuracy(tokens.new_model(), windows)
    assert list(found) == ["accuracy", "accuracy/prose", "accuracy/code", "accuracy/names"]
    share = sum(float((windows[1] == stdlib_text.ROLES.index(role)).float().mean()) for role in stdlib_text.PROSE)
    mixed = share * found["accuracy/prose"] + (1 - share) * found["accuracy/code"]
    assert float(found["accuracy"].mean()) == pytest.approx(mixed, abs=1e-6)


def test_model_is_of_the_size_stated_and_heads_can_go() -> None:
    model = tokens.new_model().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 553_164
    attention = model.blocks[0].attention
    for layer in (attention.query, attention.key, attention.value):
        layer.weight = torch.nn.Parameter(layer.weight[:32])
        layer.bias = torch.nn.Parameter(layer.bias[:32])
    attention.out.weight = torch.nn.Parameter(attention.out.weight[:, :32])
    zeros = torch.zeros(2, stdlib_text.LENGTH, dtype=torch.int64)
    assert model(zeros).shape == (2, stdlib_text.LENGTH, len(stdlib_text.ROLES))


def test_an_index_outside_the_embedding_reads_no_foreign_memory(device: LocalDevice) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 16)).eval()
    known = torch.tensor([[0, 9, 3]])
    compiled = build(model, (known,), device.profile, device.tuner)
    expected = model(known).detach().numpy()
    np.testing.assert_array_equal(compiled.run(known), expected)
    np.testing.assert_array_equal(compiled.run(torch.tensor([[-5, 10**6, 3]])), expected)


@pytest.mark.slow  # the whole training
def test_full_recipe_reaches_its_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    task = tokens.load_tokens_task(cache=False)
    assert 0.90 <= evaluate_task(task, task.model)["accuracy"] <= 0.97

"""The fitted tier-0 model: what it can represent it finds, what it predicts the solver's tables say too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pipeline import pipeline

from autocomp.accuracy.additive import ENOUGH, AdditiveModel, additive_model
from autocomp.accuracy.proxy import stitch_and_score
from autocomp.accuracy.sensitivity import additive_error
from autocomp.study.solver import Factor, make_problem


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    found = pipeline("plain")
    database = found.database(tmp_path_factory.mktemp("layers"))
    rng = np.random.default_rng(1)
    drawn = {candidate.id: candidate for candidate in (found.space.draw(rng) for _ in range(80))}
    return found, database, additive_model(database.tables()), list(drawn.values())


def rank_correlation(a, b) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def test_without_a_fit_it_is_the_raw_sum(made) -> None:
    _, _, model, candidates = made
    raw = [additive_error(model.tables, candidate) for candidate in candidates]
    np.testing.assert_allclose(model.predict(candidates), raw)
    assert model.fitted(candidates[: ENOUGH - 1], raw[: ENOUGH - 1]) is model
    assert model.fitted_tables() == list(model.tables)


def test_terms_of_fp32_and_methods_add_up_to_the_raw_error(made) -> None:
    model = made[2]
    summed = [k for k, name in enumerate(model.names) if not name.startswith("pair")]
    for table, terms in zip(model.tables, model.terms, strict=True):
        assert (terms >= 0).all()
        # Where a method happens to do better than full precision, the terms say no better than equal.
        assert (terms[summed].sum(0) >= table.error - 1e-12).all()
        np.testing.assert_allclose(terms[summed].sum(0)[:, :, 0], np.maximum(table.error[:, :, 0], 0))


def test_coefficients_it_can_represent_are_found(made) -> None:
    _, _, model, candidates = made
    true = np.tile(np.linspace(0.5, 2.0, len(model.names)), (len(model.tables), 1))
    divergences = replace(model, coefficients=true).predict(candidates)
    fitted = model.fitted(candidates, divergences)
    np.testing.assert_allclose(fitted.predict(candidates), divergences, rtol=0.02, atol=1e-9)
    assert (fitted.coefficients >= 0).all()
    assert rank_correlation(model.held_out(candidates, divergences), divergences) > 0.99


def test_divergences_that_say_nothing_are_left_out(made) -> None:
    _, _, model, candidates = made
    values = np.linspace(0.1, 1.0, len(candidates))
    spoilt = [*values, np.inf, np.nan, -1.0, 0.0]
    fitted, other = model.fitted(candidates, values), model.fitted([*candidates, *candidates[:4]], spoilt)
    np.testing.assert_allclose(fitted.coefficients, other.coefficients)


def test_the_solver_sees_what_the_model_predicts(made) -> None:
    found, _, model, candidates = made
    values = model.predict(candidates) ** 0.7 + 1e-6
    fitted: AdditiveModel = model.fitted(candidates, values)
    factors = [Factor(**vars(table), seconds=np.zeros(table.error.shape)) for table in fitted.fitted_tables()]
    problem = make_problem(factors, found.space.widths)
    levels = np.array([problem.encode(candidate) for candidate in candidates])
    np.testing.assert_allclose(problem.costs(levels)[0], fitted.predict(candidates), rtol=1e-9)


def test_forbidden_combinations_stay_forbidden(made) -> None:
    _, _, model, candidates = made
    first = model.tables[0]
    error = first.error.copy()
    error[-1, -1, -1] = np.inf
    forbidding = additive_model([replace(first, error=error), *model.tables[1:]])
    fitted = forbidding.fitted(candidates, np.linspace(0.1, 1.0, len(candidates)))
    assert fitted.fitted_tables()[0].error[-1, -1, -1] == np.inf
    assert all(np.isfinite(table.error).all() for table in fitted.fitted_tables()[1:])


def test_it_ranks_candidates_it_has_not_seen(made) -> None:
    found, database, model, candidates = made
    divergences = [stitch_and_score(found.model, found.graph, database, candidate)[1] for candidate in candidates]
    held_out = model.held_out(candidates, divergences)
    assert rank_correlation(held_out, divergences) > 0.9
    assert rank_correlation(held_out, divergences) > rank_correlation(model.predict(candidates), divergences) - 0.01


def test_draws_reach_from_mild_to_strong() -> None:
    space = pipeline("plain").space
    rng = np.random.default_rng(0)
    kept = [
        np.mean([drawn.widths[g] / w[0] for g, w in space.widths.items() if len(w) > 1])
        for drawn in (space.draw(rng) for _ in range(60))
    ]
    assert min(kept) < 0.4
    assert max(kept) > 0.9

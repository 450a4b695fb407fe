"""Intervals, flips and null values against closed forms and hand counts."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import contingency_tables, multitest, power, proportion

from eval import metrics, statistics
from eval.statistics import Resamples


def test_resamples_are_fixed_by_name_and_size() -> None:
    first, second = Resamples.draw({"a": 30, "b": 40}, 50), Resamples.draw({"b": 40}, 50)
    assert first.weights["a"].shape == (50, 30)
    np.testing.assert_allclose(first.weights["a"].sum(axis=1), 1)
    np.testing.assert_array_equal(first.weights["b"], second.weights["b"])
    assert not np.array_equal(first.weights["a"][:, :30], Resamples.draw({"c": 30}, 50).weights["c"])


def test_matrices_are_weighted_means_in_the_order_asked_for() -> None:
    cells = {"a": np.array([[0.0, 100.0], [100.0, 100.0]]), "b": np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 100.0]])}
    resamples = Resamples({"a": np.array([[0.5, 0.5], [1.0, 0.0]]), "b": np.array([[1 / 3] * 3, [0.0, 0.0, 1.0]])})
    matrices = resamples.matrices(cells, ("b", "a"))
    assert matrices.shape == (2, 2, 2)
    np.testing.assert_allclose(matrices[0], [[0, 50], [100 / 3, 100]])
    np.testing.assert_allclose(matrices[1], [[0, 0], [100, 100]])


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    scores = np.repeat([100.0, 0.0], [120, 80])
    drawn = Resamples.draw({"a": 200}, 20_000).weights["a"] @ scores
    low, high = statistics.interval(60.0, drawn)
    half = 1.96 * 100 * np.sqrt(0.6 * 0.4 / 200)
    assert (low, high) == pytest.approx((60 - half, 60 + half), abs=0.6)


def test_pairing_narrows_a_difference() -> None:
    random = np.random.default_rng(0)
    before = np.where(random.random(300) < 0.6, 100.0, 0.0)
    after = np.where(random.random(300) < 0.05, 100 - before, before)
    weights = Resamples.draw({"a": 300}).weights["a"]
    paired = weights @ after - weights @ before
    unpaired = weights @ after - Resamples.draw({"b": 300}).weights["b"] @ before
    assert paired.std() < 0.5 * unpaired.std()


def test_interval_reflects_and_respects_a_ceiling() -> None:
    skewed = np.linspace(-6.0, -2.0, 1001)  # replicates of a biased statistic whose estimate is -3
    assert statistics.interval(-3.0, skewed) == pytest.approx((-3.9, -0.1))
    assert statistics.interval(-1.0, skewed, ceiling=0.0) == pytest.approx((0.0, 0.0), abs=0.11)


def test_seed_interval_is_students() -> None:
    assert statistics.seed_interval([1.0]) is None
    # Mean 2, standard deviation 1, t(2) at 97.5 % = 4.3027.
    assert statistics.seed_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3
    )


def test_flips_and_mcnemar_by_hand() -> None:
    before = np.array([100.0] * 6 + [0.0] * 4)
    after = np.array([0.0] * 5 + [100.0] * 2 + [0.0] * 3)
    found = statistics.flips(before, after)
    assert (found.rows, found.lost, found.gained) == (10, 5, 1)
    # Exact: 2 * (C(6,0) + C(6,1)) / 2^6.
    assert found.p_value == pytest.approx(2 * 7 / 64)
    assert statistics.flips(before, before) == (10, 0, 0, 1.0)


def test_churn_counts_steps() -> None:
    assert statistics.churn(np.array([[0.0, 100.0], [100.0, 100.0], [100.0, 0.0]])) == pytest.approx(0.5)
    assert statistics.churn(np.array([[0.0, 100.0]])) == 0.0


@pytest.mark.parametrize(("rows", "low", "high"), [(300, -2.4, -1.2), (2000, -0.95, -0.45)])
def test_null_value_of_fm_is_what_a_simulation_gave(rows: int, low: float, high: float) -> None:
    # Simulated beforehand: -1.2 to -1.9 with 300 rows, -0.5 to -0.8 with 2,000, answers flipping by 10 to 30 %.
    for churn in (0.1, 0.2, 0.3):
        assert low < statistics.null_fm([65.0] * 7, [rows] * 7, [churn] * 7, seed=1).mean() < high


def test_null_value_has_the_churn_that_was_observed() -> None:
    # With two tasks FM is min(0, second - first) of task 1, and the churn alone fixes its spread.
    found = statistics.null_fm([60.0, 60.0], [500, 500], [0.2, 0.2], seed=3, replicates=20_000)
    assert found.mean() == pytest.approx(-100 * np.sqrt(0.2 / 500) / np.sqrt(2 * np.pi), rel=0.05)


def test_null_value_without_churn_is_zero() -> None:
    assert not statistics.null_fm([50.0, 80.0, 100.0], [50] * 3, [0.0] * 3, seed=0).any()
    assert not statistics.null_fm([0.0, 100.0], [50] * 2, [0.0] * 2, seed=0).any()
    same = [statistics.null_fm([65.0] * 3, [50] * 3, [0.2] * 3, seed=4) for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_middle_holds_95_percent() -> None:
    assert statistics.middle(np.arange(1001.0)) == pytest.approx((25, 975))


def test_bootstrap_of_bwt_finds_the_true_spread() -> None:
    """Against many fresh draws of the examples themselves: the bootstrap's standard deviation is theirs."""
    random = np.random.default_rng(5)
    rows, tasks = 200, ("a", "b")

    def draw() -> dict[str, np.ndarray]:
        cells = {}
        for task in tasks:
            first = random.random(rows) < 0.7
            last = np.where(random.random(rows) < 0.2, ~first, first)
            cells[task] = 100.0 * np.stack([random.random(rows) < 0.3, first, last])
        return cells

    def point(cells: dict[str, np.ndarray]) -> float:
        return float(metrics.bwt(np.stack([cells[task].mean(axis=1) for task in tasks], axis=-1)))

    true = np.std([point(draw()) for _ in range(400)])
    resamples = Resamples.draw(dict.fromkeys(tasks, rows))
    boot = np.mean([metrics.bwt(resamples.matrices(draw(), tasks)).std() for _ in range(20)])
    assert boot == pytest.approx(true, rel=0.12)


def test_rows_of_one_picture_are_drawn_together() -> None:
    clusters = [7, 7, 3, 9, 9, 9]
    weights = Resamples.draw({"a": 6}, 400, {"a": clusters}).weights["a"]
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_array_equal(weights[:, 3], weights[:, 5])
    assert not np.array_equal(weights[:, 1], weights[:, 2])
    alone = Resamples.draw({"a": 6}, 400).weights["a"]
    np.testing.assert_array_equal(Resamples.draw({"a": 6}, 400, {"a": [5, 4, 3, 2, 1, 0]}).weights["a"], alone)


def test_the_clustered_spread_is_that_of_the_sandwich() -> None:
    """Against the closed form: the standard error of a ratio, with one residual a cluster."""
    random = np.random.default_rng(2)
    clusters = np.repeat(np.arange(120), random.integers(1, 6, 120))
    scores = np.where(random.random(120)[clusters] < 0.6, 100.0, 0.0)
    drawn = Resamples.draw({"a": len(scores)}, 20_000, {"a": clusters.tolist()}).weights["a"] @ scores
    residuals = np.bincount(clusters, scores - scores.mean())
    error = np.sqrt((residuals**2).sum()) / len(scores)
    assert drawn.std() == pytest.approx(error, rel=0.04)
    assert drawn.std() > 1.5 * scores.std() / np.sqrt(len(scores))


def test_an_accuracy_agrees_with_scipy_and_statsmodels() -> None:
    scores = np.repeat([100.0, 0.0], [130, 70])
    drawn = Resamples.draw({"a": 200}, 20_000).weights["a"] @ scores
    found = statistics.interval(65.0, drawn)
    normal = [100 * bound for bound in proportion.proportion_confint(130, 200, method="normal")]
    assert found == pytest.approx(normal, abs=0.5)
    theirs = stats.bootstrap((scores,), np.mean, method="basic", n_resamples=20_000, rng=np.random.default_rng(0))
    assert found == pytest.approx(tuple(theirs.confidence_interval), abs=0.5)


def test_the_interval_over_seeds_is_that_of_scipy() -> None:
    values = [-4.1, -2.0, -7.3, -3.3]
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert statistics.seed_interval(values) == pytest.approx((theirs.low, theirs.high))


def test_mcnemar_and_holm_are_those_of_statsmodels() -> None:
    random = np.random.default_rng(1)
    p_values = []
    for chance in (0.05, 0.1, 0.2, 0.4):
        before = np.where(random.random(80) < 0.7, 100.0, 0.0)
        after = np.where(
            (random.random(80) < chance) & (before > 0), 0.0, np.where(random.random(80) < 0.05, 100.0, before)
        )
        table = [[((before > 50) == a) & ((after > 50) == b) for b in (True, False)] for a in (True, False)]
        theirs = contingency_tables.mcnemar([[int(cell.sum()) for cell in row] for row in table], exact=True)
        p_values.append(statistics.flips(before, after).p_value)
        assert p_values[-1] == pytest.approx(theirs.pvalue)
    assert statistics.holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())
    assert statistics.holm([]) == []
    assert statistics.holm([0.9, 0.9]) == [1.0, 1.0]


def test_the_smallest_effect_is_that_of_a_power_analysis() -> None:
    """A paired difference of n rows with standard deviation s: statsmodels' effect size times s."""
    change = np.random.default_rng(3).choice([-100.0, 0.0, 100.0], 400, p=[0.15, 0.75, 0.1])
    drawn = Resamples.draw({"a": 400}, 20_000).weights["a"] @ change
    theirs = power.zt_ind_solve_power(nobs1=400, ratio=0, alpha=0.05, power=0.8, alternative="two-sided")
    assert statistics.smallest_effect(drawn) == pytest.approx(theirs * change.std(ddof=1), rel=0.03)

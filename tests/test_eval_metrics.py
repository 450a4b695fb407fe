"""The metrics on matrices small enough to check by hand, and on what two other code bases compute."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eval import metrics
from eval.metrics import MatrixError

# Base row, then after tasks 1, 2, 3.
HAND = [
    [10.0, 20.0, 30.0],
    [80.0, 25.0, 31.0],
    [90.0, 70.0, 28.0],
    [60.0, 75.0, 50.0],
]

VECTORS = json.loads((Path(__file__).parent / "vectors" / "continual_learning_matrix.json").read_text())["cases"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("avg_acc", (60 + 75 + 50) / 3),
        ("learned", (80 + 70 + 50) / 3),
        ("bwt", ((60 - 80) + (75 - 70)) / 2),
        # Rows 1 and 2 for task 1 (its best is 90), row 2 for task 2.
        ("forgetting_max_minus_last", ((90 - 60) + (70 - 75)) / 2),
        # The last row counts too, so a task that improved to the end forgot nothing.
        ("fm", ((60 - 90) + (75 - 75)) / 2),
        ("average_incremental_accuracy", (80 + (90 + 70) / 2 + (60 + 75 + 50) / 3) / 3),
        ("forward_transfer", ((25 - 20) + (28 - 30)) / 2),
        ("bwt_over_tasks", ((60 - 80) + (75 - 70)) / 3),
        ("bwt_all_pairs", ((90 - 80) + (60 - 80) + (75 - 70)) / 3),
        ("accuracy_all_pairs", (80 + 90 + 70 + 60 + 75 + 50) / 6),
        ("forward_transfer_without_base", (25 + 28) / 2),
        ("forgetting_max_including_last", 30 / 2),
        ("forgetting_first_minus_last", (20 - 5) / 2),
        ("forgetting_over_tasks", (30 - 5) / 3),
        ("remembering", 100 - 5 / 3),
        ("positive_backward_transfer", 0.0),
    ],
)
def test_by_hand(name: str, expected: float) -> None:
    assert float(getattr(metrics, name)(HAND)) == pytest.approx(expected)


def test_intransigence_by_hand() -> None:
    assert float(metrics.intransigence(HAND, [85, 70, 60])) == pytest.approx((5 + 0 + 10) / 3)
    with pytest.raises(MatrixError, match="multi-task"):
        metrics.intransigence(HAND, [85, 70])
    with pytest.raises(MatrixError, match="multi-task"):
        metrics.intransigence(HAND, [85, 70, float("nan")])


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_agrees_with_other_code(case: dict) -> None:
    matrix = np.array([case["base_b"], *case["R"]], dtype=float)
    plain, mammoth, continuum = (
        case[key] for key in ("plain_formulas(percent)", "mammoth(percent)", "continuum(0..1)")
    )
    expected = {
        "avg_acc": plain["final_average_accuracy"],
        "average_incremental_accuracy": plain["average_incremental_accuracy"],
        "learned": plain["mean_finetune_accuracy_diag"],
        "bwt": plain["BWT_lopezpaz"],
        "forward_transfer": plain["FWT_lopezpaz"],
        "forgetting_max_minus_last": plain["forgetting_chaudhry_max_over_l_in_j..T-2"],
        "forgetting_max_including_last": plain["forgetting_clipped_mammoth_max_incl_last"],
        "accuracy_all_pairs": 100 * continuum["accuracy_A"],
        "bwt_all_pairs": 100 * continuum["backward_transfer"],
        "forward_transfer_without_base": 100 * continuum["forward_transfer"],
        "remembering": 100 * continuum["remembering"],
        "positive_backward_transfer": 100 * continuum["positive_backward_transfer"],
    }
    for name, value in expected.items():
        assert float(getattr(metrics, name)(matrix)) == pytest.approx(value, abs=1e-4), name
    assert float(metrics.bwt(matrix)) == pytest.approx(mammoth["backward_transfer"], abs=1e-4)
    assert float(metrics.forward_transfer(matrix)) == pytest.approx(mammoth["forward_transfer"], abs=1e-4)
    assert -float(metrics.fm(matrix)) == pytest.approx(mammoth["forgetting_lower_triangle_rows"], abs=1e-4)
    assert 100 * continuum["forgetting"] == pytest.approx(float(metrics.forgetting_max_minus_last(matrix)), abs=1e-4)


@given(arrays(float, (5, 5, 4), elements=st.floats(0, 100)))
def test_many_matrices_at_once_and_bounds(matrices: np.ndarray) -> None:
    everything = metrics.HEADLINE | metrics.FURTHER | metrics.CONVENTIONS
    for name, metric in everything.items():
        together = metric(matrices)
        assert together.shape == (5,), name
        np.testing.assert_allclose(together, [metric(matrix) for matrix in matrices], err_msg=name)
    assert (metrics.fm(matrices) <= 0).all()
    assert (metrics.fm(matrices) <= metrics.bwt(matrices) + 1e-9).all()
    assert (-metrics.fm(matrices) >= metrics.forgetting_max_minus_last(matrices) - 1e-9).all()


@given(arrays(float, (5, 4), elements=st.floats(0, 100)), st.integers(0, 3))
def test_cells_before_learning_do_not_matter_for_forgetting(matrix: np.ndarray, column: int) -> None:
    changed = matrix.copy()
    changed[: column + 1, column] = 99.0
    for name in ("avg_acc", "learned", "bwt", "fm", "forgetting_max_minus_last", "average_incremental_accuracy"):
        assert getattr(metrics, name)(changed) == pytest.approx(getattr(metrics, name)(matrix)), name


@pytest.mark.parametrize(
    "metric", [*metrics.HEADLINE.values(), *metrics.FURTHER.values(), *metrics.CONVENTIONS.values()]
)
def test_incomplete_matrices_are_refused(metric: metrics.Metric) -> None:
    holed = np.array(HAND)
    holed[2, 1] = np.nan
    with pytest.raises(MatrixError, match="task 2 after stage 2 is missing"):
        metric(holed)
    with pytest.raises(MatrixError, match=r"shape \(3, 3\)"):
        metric(np.ones((3, 3)))  # no base row


def test_one_task_has_nothing_to_forget() -> None:
    assert float(metrics.avg_acc([[10.0], [70.0]])) == 70
    assert float(metrics.learned([[10.0], [70.0]])) == 70
    for metric in (metrics.bwt, metrics.fm, metrics.forgetting_max_minus_last, metrics.forward_transfer):
        with pytest.raises(MatrixError, match="at least two tasks"):
            metric([[10.0], [70.0]])

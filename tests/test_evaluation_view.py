"""The demo's report shows an evaluation as metrics.json has it: noise beside every figure, what it hides by name."""

import json

import numpy as np
import pytest

from fedfin.audit.evaluation_view import evaluation_view, last_evaluation
from fedfin.audit.pack_plots import calibration_plot
from fedfin.credit.score_counts import count_scores
from fedfin.plan import JobPlan
from fedfin.server.evaluation import evaluation_sum
from fedfin.simulation.partition import demo_loans

LOANS, SCHEMA = demo_loans()


def evaluation(noise):
    """An evaluation of the demo's loans, with made-up probabilities that tell a little."""
    rng = np.random.default_rng(0)
    probabilities = np.clip(rng.beta(2, 5, len(LOANS)) + 0.2 * LOANS.labels, 0.0, 1.0)
    counts = count_scores(LOANS.frame, LOANS.labels, probabilities, SCHEMA, 0.3).astype(float)
    noised = counts + rng.normal(0.0, noise, counts.shape)
    job = JobPlan.model_validate({"evaluation": {"cutoff": 0.3}})
    return evaluation_sum(noised, SCHEMA, number=1, plan=job, num_lenders=8, noise_stddev=noise)


def test_exact_counts_have_figures_without_errors():
    view = evaluation_view(evaluation(0.0))
    assert (view.lenders, view.is_noisy, view.cutoff, view.hidden) == (8, False, 0.3, ())
    assert [figure.name for figure in view.figures][:2] == ["AUROC", "KS"]
    assert {figure.error for figure in view.figures} == {""}
    assert next(figure.value for figure in view.figures if figure.name == "share of bad loans") == "0.282"


def test_noise_stands_beside_every_figure_and_what_it_hides_is_named():
    view = evaluation_view(evaluation(12.0))
    assert view.is_noisy
    assert all(float(figure.error) > 0 for figure in view.figures)
    assert "log loss" in view.hidden
    assert {figure.name for figure in view.figures} & set(view.hidden) == set()
    assert "Marital: widow" in view.hidden_groups


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_every_group_stands_beside_the_reference_of_its_column(noise):
    document = evaluation(noise)
    view = evaluation_view(document)
    assert [row.group for row in view.groups if row.parity == "reference"] == ["18 to 38.5", "married"]
    others = [row for row in view.groups if row.parity != "reference"]
    assert all("±" in row.parity and row.accepted.endswith("%") for row in others)
    assert len(view.groups) + len(view.hidden_groups) >= sum(
        len(one["groups"]) for one in document["fairness"]
    )


def test_the_calibration_plot_draws_the_tenths_and_their_noise():
    document = evaluation(3.0)
    (axes,) = calibration_plot(document).axes
    assert len(axes.containers) == 1  # points with their errors
    drawn = axes.containers[0].lines[0].get_xydata()
    assert drawn[:, 0] == pytest.approx([tenth["predicted"] for tenth in document["calibration"]])
    assert drawn[:, 1] == pytest.approx([tenth["actual"]["value"] for tenth in document["calibration"]])


def test_the_last_evaluation_of_a_run_is_shown_and_none_where_there_is_none(tmp_path):
    assert last_evaluation(tmp_path) is None
    (tmp_path / "metrics.json").write_text(
        json.dumps({"evaluations": [{"evaluation": 1}, {"evaluation": 2}]})
    )
    assert last_evaluation(tmp_path) == {"evaluation": 2}

"""How strong the demo's `alone` arm is: beside it a peer that a lender of 90 loans could train, and the federation.

What a small lender gains by joining is only as honest as the model it is compared with. `train_alone` is the better,
by the lender's own cross-validation, of the federation's two families of models on the lender's own bins. Its peer
here is what an analyst may well do instead, with scikit-learn: a logistic regression on standardised numbers
(log1p first where the schema's grid is log; a missing one becomes the median and sets an indicator) and one-hot
categories, C chosen by repeated stratified cross-validation. Both see the model's features and the lender's own 90
loans, and nothing else. The federation is the one-process one, without privacy and at epsilon 3 in modes local and
shared (the demo's job, every lender answering); the last two are means over eight draws of the noise, since one draw
moves a split's AUROC by about .004 and the mean of five splits by .002.

Split seeds 0 to 4, the five small lenders of each; AUROC on the split's common held-out loans; every figure is a mean
over these 25. The plan's defaults were tuned on the same seeds (docs/decisions/0009-defaults-of-the-plan.md).

    OMP_NUM_THREADS=1 python benchmarks/alone_arm.py [--json]
"""

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
from demo_modes import CHOSEN_RATE, CHOSEN_ROUNDS, shared_plan
from machine import document, print_document
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RepeatedStratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from fedfin.client.alone import train_alone
from fedfin.credit.metrics import auroc
from fedfin.credit.schema import NumericColumn, Schema
from fedfin.plan import JobPlan
from fedfin.simulation.arms import demo_plan, federate, take_rows
from fedfin.simulation.partition import demo_loans, split_demo

if TYPE_CHECKING:
    from fedfin.credit.source import Loans

SEEDS = range(5)
INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # scikit-learn's C
NUM_FOLDS = 5
NUM_REPEATS = 3  # as train_alone
NUM_DRAWS = 8  # of the noise, for each split
MODELS = ("train_alone", "standardised", "federated_none", "federated_eps3", "federated_shared3")


def standardised_regression(own: "Loans", schema: Schema, seed: int) -> GridSearchCV:
    """Return the peer, fitted on one lender's loans.

    Args:
        own: The lender's training loans; not changed.
        schema: The columns; special codes are not treated, the demo's has none.
        seed: Draws the folds.

    Returns:
        The search, refitted on all of `own` with the best C; medians, scales and categories were learnt anew in
        every fold.
    """
    numeric = [column for column in schema.features if isinstance(column, NumericColumn)]
    skewed = [column.name for column in numeric if column.grid == "log"]
    even = [column.name for column in numeric if column.grid == "linear"]
    words = [column.name for column in schema.features if not isinstance(column, NumericColumn)]
    steps = [("impute", SimpleImputer(strategy="median")), ("scale", StandardScaler())]
    inputs = ColumnTransformer(
        [
            ("skewed", Pipeline([("log", FunctionTransformer(np.log1p)), *steps]), skewed),
            ("even", Pipeline(steps), even),
            # features="all": a column that lacks nothing here may lack something in the held-out loans
            ("missing", MissingIndicator(features="all"), skewed + even),
            (
                "words",
                OneHotEncoder(handle_unknown="ignore"),
                words,
            ),  # a missing word is a category of its own
        ]
    )
    search = GridSearchCV(
        Pipeline([("inputs", inputs), ("regression", LogisticRegression(max_iter=1000))]),
        {"regression__C": INVERSE_PENALTIES},
        scoring="roc_auc",
        cv=RepeatedStratifiedKFold(n_splits=NUM_FOLDS, n_repeats=NUM_REPEATS, random_state=seed),
    )
    return search.fit(own.frame, own.labels)


def rows_of_split(loans: "Loans", schema: Schema, seed: int) -> list[dict[str, Any]]:
    """Return one row for each small lender of this split: the AUROC of every model on the held-out loans."""
    split = split_demo(loans, seed)
    held_out = take_rows(loans, split.held_out)
    lenders = [take_rows(loans, lender.rows) for lender in split.lenders]

    def federated_auroc(plan: JobPlan, draws: int) -> float:
        models = [federate(lenders, schema, plan, seed + 1000 * draw) for draw in range(draws)]
        return float(np.mean([auroc(held_out.labels, model.predict(held_out.frame)) for model in models]))

    without_privacy = federated_auroc(demo_plan(None), 1)  # at sample rate 1 nothing random is left in it
    private = federated_auroc(demo_plan(3.0), NUM_DRAWS)
    shared = federated_auroc(shared_plan(3.0, CHOSEN_ROUNDS, CHOSEN_RATE), NUM_DRAWS)
    rows = []
    for position, lender in enumerate(split.lenders):
        if lender not in split.small_lenders:
            continue
        own = lenders[position]
        # the stream of compare_arms, so that these are its figures
        alone = train_alone(own.frame, own.labels, schema, np.random.default_rng([seed, position]))
        peer = standardised_regression(own, schema, seed)
        rows.append(
            {
                "seed": seed,
                "lender": lender.name,
                "train_alone": auroc(held_out.labels, alone.predict(held_out.frame)),
                "standardised": auroc(held_out.labels, peer.predict_proba(held_out.frame)[:, 1]),
                "federated_none": without_privacy,
                "federated_eps3": private,
                "federated_shared3": shared,
                "kind_alone": alone.architecture.kind,
                "C": peer.best_params_["regression__C"],
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    loans, schema = demo_loans()
    rows = [row for seed in SEEDS for row in rows_of_split(loans, schema, seed)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in MODELS}
    figures = {f"alone_arm.{name}": mean for name, mean in means.items()}
    for privacy in ("none", "eps3", "shared3"):
        for peer in ("train_alone", "standardised"):
            figures[f"alone_arm.gain_{privacy}_over_{peer}"] = means[f"federated_{privacy}"] - means[peer]
    print_document(document("alone_arm", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()

"""The plan that `fedfin privacy plan` and `fedfin privacy audit` work on: the default one, a file's, or a job's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedfin.errors import ConfigError

if TYPE_CHECKING:
    from fedfin.plan import JobPlan

__all__ = ["EpsilonOption", "JobOption", "ModelOption", "RoundsOption", "chosen_plan"]

JobOption = Annotated[
    str | None,
    typer.Option(
        "--job",
        help=(
            "Take the plan from a federation.yaml or, with --config, from a job that this lender accepted: its id, or"
            " its job.json. Without it fedfin's built-in default plan."
        ),
        show_default=False,
        metavar="FILE|ID",
    ),
]
EpsilonOption = Annotated[
    float | None, typer.Option("--epsilon", help="Epsilon of the whole job; default: the plan's.")
]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Rounds; default: the plan's.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="logistic, mlp or attention; default: the plan's.")
]
_LENDERS: Final = 5
_OPTIONS: Final = {
    "privacy.epsilon": "--epsilon",
    "privacy.delta": "--delta",
    "training.rounds": "--rounds",
    "training.local_steps": "--local-steps",
    "training.sample_rate": "--sample-rate",
    "model.kind": "--model",
}


def chosen_plan(
    job: str | None, config: Path | None, changes: Mapping[str, Any], lenders: int | None = None
) -> "tuple[JobPlan, int]":
    """Return the plan that `--job` names, with what other options change, and the number of lenders.

    Args:
        job: What was given with `--job`; None for the default plan.
        config: The lender's bank.yaml, whose accepted jobs may be named; None without one.
        changes: New values by the plan's keys, such as "training.rounds"; None leaves a value.
        lenders: What was given with `--lenders`; None for the plan's, or 5 for the default plan.

    Raises:
        ConfigError: There is no such job or file, it does not hold a plan, or a value has no meaning.
    """
    from pydantic import ValidationError

    from fedfin.plan import JobPlan

    if job is None:
        num_lenders = lenders or _LENDERS
        document = JobPlan().model_dump()
        document["cohort"]["min_lenders"] = max(2, num_lenders)
        if num_lenders < 3:
            document["aggregation"] = "plain"  # fewer than three cannot sum in secret
    else:
        stated = _stated_plan(job, config)
        num_lenders = lenders or stated.cohort.wait_for or stated.cohort.min_lenders
        document = stated.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if value is not None:
            document[section][name] = value
    try:
        return JobPlan.model_validate(document), num_lenders
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        said = f"{_OPTIONS.get(key, key)} is {first['input']!r}: " if key else ""
        raise ConfigError(f"{said}{text[0].lower()}{text[1:]}") from None


def _stated_plan(job: str, config: Path | None) -> "JobPlan":
    from fedfin.client.folder import LenderFolder
    from fedfin.config import FederationConfig
    from fedfin.parsing import load_config

    path = Path(job)
    folder = None if config is None else LenderFolder(config)
    if folder is not None:
        # compared with what is there, never joined to the path: an id cannot lead out of the folder
        accepted = sorted(found.parent.name for found in folder.jobs_path.glob("*/job.json"))
        if job in accepted:
            return _accepted_plan(folder.jobs_path / job / "job.json")
        if not path.exists():
            listed = f"it accepted {', '.join(accepted)}" if accepted else "it accepted none yet"
            msg = (
                f"--job {job} does not exist: it is neither a file nor the id of a job that {folder.config.name}"
                f" accepted ({listed}); give one of these, or the coordinator's federation.yaml"
            )
            raise ConfigError(msg)
    if not path.exists():
        msg = (
            f"{job} does not exist; give the coordinator's federation.yaml with --job, or the id of an accepted job"
            " with --job and the lender's bank.yaml with --config"
        )
        raise ConfigError(msg)
    if path.name == "job.json":
        return _accepted_plan(path)
    return load_config(path, FederationConfig).job


def _accepted_plan(path: Path) -> "JobPlan":
    """Read the plan of a job from its job.json, which is there."""
    from fedfin.client.folder import JobFolder
    from fedfin.plan import JobPlan

    accepted = JobFolder(path.parent).accepted()
    try:
        return JobPlan.model_validate_json((accepted or {})["plan"])
    except (KeyError, ValueError) as error:
        msg = f"{path} holds no plan that this release of fedfin knows; restore it, or use the release that wrote it"
        raise ConfigError(msg) from error

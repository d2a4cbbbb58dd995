"""A federation's evidence made small: a coordinator's log with members, a cosigned checkpoint, and a run directory."""

import json
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from rosters import authority, coordinator, founded, keys_of

from fedfin.audit.checkpoint import cosign, parse_checkpoint
from fedfin.audit.consents import sign_answer
from fedfin.audit.events import (
    Approval,
    Consent,
    Enrolment,
    PlanProposed,
    Release,
    RosterVersion,
    RoundCompleted,
    Service,
)
from fedfin.audit.log import AuditLog
from fedfin.audit.sealing import seal_run
from fedfin.identity import key_fingerprint, private_pem
from fedfin.plan import JobPlan

MEMBERS = ("city-bank", "family-micro", "north-bank")
JOB = "credit-1a2b3c4d"
ORIGIN = "fedfin/test/coordinator"
PLAN = JobPlan.model_validate(
    {
        "privacy": {"mode": "local", "epsilon": 3.0},
        "training": {"rounds": 2, "local_steps": 2},
        "cohort": {"min_lenders": 3},
    }
)
MODELS = tuple(f"{number:064x}" for number in (10, 11, 12))
SCHEMA = """\
label: {name: target, bad: ["1"], good: ["0"], definition: ninety days past due}
columns:
- {name: Income, kind: numeric, description: income, minimum: 0.0, maximum: 2000.0}
- {name: Sex, kind: categorical, description: sex, categories: [f, m], protected: true}
"""


def rate(value: float) -> dict[str, float]:
    return {"value": value, "noise_error": 0.01, "sampling_error": 0.02}


def evaluation(number: int, after: int) -> dict[str, object]:
    """As metrics.json holds one, with one tenth and one protected column."""
    names = ("loans", "auroc", "ks", "brier", "log_loss", "bad_rate", "calibration_ratio")
    group = {
        "loans": rate(100.0),
        "accepted": rate(0.8),
        "good_accepted": rate(0.9),
        "opportunity": rate(0.02),
    }
    return {
        "evaluation": number,
        "round": after,
        "lenders": 3,
        "cutoff": 0.2,
        "noise_stddev": 3.0,
        "figures": {name: {"value": 0.7, "noise_error": 0.01} for name in names},
        "hidden_by_noise": [],
        "calibration": [
            {"low": 0.0, "high": 0.5, "loans": rate(60.0), "predicted": 0.2, "actual": rate(0.3)},
            {"low": 0.5, "high": 1.0, "loans": rate(40.0), "predicted": 0.6, "actual": rate(0.5)},
        ],
        "fairness": [
            {
                "column": "Sex",
                "reference": "m",
                "groups": [
                    {"label": "m", "parity": rate(0.0), **group},
                    {"label": "f", "parity": rate(0.05), **group},
                ],
                "hidden": [],
            }
        ],
    }


def consent(member: str, *, key=None) -> Consent:
    answer = Consent(job=JOB, member=member, plan=PLAN.digest(), decision="accepted")
    signature = sign_answer(answer, key or keys_of(member).identity, ORIGIN)
    return answer.model_copy(update={"signature": signature})


def federation_log(folder: Path, *, members=MEMBERS, cosigners=MEMBERS, extra=()) -> Path:
    """The coordinator's folder with a log of one job, cosigned, and closed; its key is beside it."""
    (folder / "keys").mkdir(parents=True)
    key_path = folder / "keys" / "identity.key"
    key_path.write_bytes(private_pem(coordinator().key))
    key_path.chmod(0o600)
    path = folder / "audit.db"
    chain = founded(MEMBERS)
    with AuditLog.create(
        path, origin=ORIGIN, actor="coordinator", key=coordinator().key, side="coordinator"
    ) as log:
        log.append(Service(action="started", release="0.1.0"))
        log.append_many(
            Enrolment(
                member=name,
                federation="test",
                identity=key_fingerprint(keys_of(name).identity.public_key()),
                witness=key_fingerprint(keys_of(name).witness.public_key()),
            )
            for name in members
        )
        log.append_many(
            [
                RosterVersion(
                    action="signed", number=1, digest=chain.last.digest(), num_members=3, signed_by=MEMBERS
                ),
                PlanProposed(
                    job=JOB,
                    digest=PLAN.digest(),
                    model="logistic",
                    strategy="fedavg",
                    aggregation="secure",
                    mode="local",
                    epsilon="3",
                    delta="1e-05",
                    rounds=2,
                    least_cohort=3,
                ),
                Approval(subject="job", job=JOB, digest=PLAN.digest()),
                *(consent(name) for name in members),
                *extra,
                *(
                    RoundCompleted(
                        job=JOB,
                        round=number,
                        cohort=MEMBERS,
                        seconds="1.5",
                        model_before=MODELS[number - 1],
                        model_after=MODELS[number],
                    )
                    for number in (1, 2)
                ),
                Release(job=JOB, model=MODELS[2], num_lenders=3),
            ]
        )
        cosigned(log, cosigners)
    return folder


def cosigned(log: AuditLog, cosigners=MEMBERS) -> str:
    """The log's checkpoint with these members' cosignatures, which it keeps."""
    note = log.checkpoint()
    lines = [cosign(note, name, keys_of(name).witness, 1_790_000_000) for name in cosigners]
    witnesses = {name: keys_of(name).witness.public_key() for name in cosigners}
    log.add_cosignatures(parse_checkpoint(note).size, lines, witnesses)
    return log.note(parse_checkpoint(note).size)


def run_directory(folder: Path, source: Path | None = None, *, roster=None, key=None) -> Path:
    """A finished run's directory at the coordinator, sealed, with its log, its roster and the root."""
    source = source or federation_log(folder / "fed")
    run = folder / "runs" / JOB
    (run / "model").mkdir(parents=True)
    document = {
        "job": JOB,
        "federation": "test",
        "created": "2026-11-24T18:24:17+00:00",
        "plan": PLAN.model_dump(mode="json"),
        "plan_digest": PLAN.digest(),
        "schema_fingerprint": "5" * 64,
        "root_fingerprint": authority().fingerprint,
        "versions": {"fedfin": "0.1.0"},
        "model": MODELS[2],
        "completed": "2026-11-24T18:25:17+00:00",
    }
    (run / "run.json").write_text(json.dumps(document, indent=1))
    events = [
        *({"event": "accepted", "lender": name} for name in MEMBERS),
        {"event": "round_short", "round": 1, "cohort": ["city-bank"], "missing": {"north-bank": "no answer"}},
        *(
            {"event": "round_done", "round": number, "cohort": list(MEMBERS), "missing": {}, "seconds": 1.5}
            for number in (1, 2)
        ),
        {"event": "delivered", "missing": [], "not_kept": {}},
        {"event": "of a later release"},
    ]
    (run / "rounds.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "metrics.json").write_text(json.dumps({"evaluations": [evaluation(1, 1), evaluation(2, 2)]}))
    model = {"digest": MODELS[2], "fingerprint": "6" * 64, "schema": SCHEMA}
    (run / "model" / "model.json").write_text(json.dumps(model))
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    (run / "audit.db").write_bytes((source / "audit.db").read_bytes())
    (run / "ca.pem").write_bytes(authority().root.public_bytes(Encoding.PEM))
    (run / "roster.json").write_text((roster or founded(MEMBERS)).to_json())
    seal_run(run, JOB, key or coordinator().key)
    return run

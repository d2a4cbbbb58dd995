"""Which field of an evidence pack supports which duty: a reader's aid, and nobody's legal advice.

A field supports a duty where a person who has it takes it from the pack and does the rest. Nothing here says that
anyone complies: that is for the institution, its counsel and its supervisor. Where the pack does not help, the row says
so. Sources are the texts named, read in the year 2026; SR 26-2 is cited by its themes, since it numbers no articles.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["OBLIGATIONS", "Obligation"]


@dataclass(frozen=True, slots=True)
class Obligation:
    """A duty, and what of the pack supports it.

    Attributes:
        source: The text and its place.
        asks: What it asks for, in a few words.
        fields: Where it is in the pack; empty where the pack does not support it.
        left: What the institution does beyond that.
    """

    source: str
    asks: str
    fields: str
    left: str


_SR: Final = "SR 26-2 (Federal Reserve, OCC, FDIC; replaced SR 11-7 in April 2026)"
_AI: Final = "EU AI Act, Regulation (EU) 2024/1689"
_B: Final = "Regulation B, 12 CFR 1002"
_MPC: Final = "JR/T 0196-2020 (multi-party computation in finance)"
_ALGORITHM: Final = "JR/T 0221-2021 (evaluation of AI algorithms in finance)"

OBLIGATIONS: Final = (
    Obligation(
        f"{_SR}: development and use",
        "purpose, design, data and assumptions of a model are documented",
        "model-card.md; run/run.json: plan, schema and software versions; report: What was agreed, Where it comes from",
        "purpose and limits in the institution's own portfolio",
    ),
    Obligation(
        f"{_SR}: validation and monitoring",
        "performance is tested, by people who did not build the model, and watched in use",
        "run/metrics.json; report: How the model does (calibration, discrimination, groups), with the error of noise",
        "an independent test on the institution's own loans; monitoring after release",
    ),
    Obligation(
        f"{_SR}: governance",
        "roles, approvals, an inventory, and controls over models made with others",
        "run/audit.db: plan, consent, approval, gate, release, retirement; the model's digest as its inventory key",
        "the inventory and the policies themselves",
    ),
    Obligation(
        f"{_AI}, article 12",
        "events are recorded automatically over the system's lifetime, so that its functioning can be traced",
        "run/audit.db: typed, signed, numbered entries with time; `fedfin audit verify`",
        "logs of each decision on an applicant, which are made by the lender's scoring system",
    ),
    Obligation(
        f"{_AI}, article 13",
        "those who use it are told its capabilities, limits, accuracy, and performance for groups of persons",
        "model-card.md; report: How the model does; how logs are read: docs/supervisor.md",
        "instructions for use in the lender's own words and language",
    ),
    Obligation(
        f"{_AI}, article 19",
        "logs are kept for six months at least; financial institutions keep them with their other records",
        "audit.db; retention classes of two to ten years (`fedfin audit prune`), proofs kept whole for ever",
        "backups, and the period that the institution's own law asks for",
    ),
    Obligation(
        f"{_B}.12(b)",
        "applications and what was used to evaluate them are kept for 25 months",
        "the model's digest and files, by which a decision can be traced to the model that made it",
        "applications, notices and reasons, which stay with the lender and are not in this pack",
    ),
    Obligation(
        f"{_B}.2(p)",
        "a scoring system is empirically derived, and validated by accepted statistical methods",
        "run/metrics.json; report: How the model does, over all lenders' held-out loans",
        "validation on the lender's own applicants, and again at intervals",
    ),
    Obligation(
        "GDPR, articles 5(2) and 30",
        "the controller can show what was done with personal data",
        "run/audit.db (no personal data in it); each lender's own log and privacy ledger",
        "the record of processing, the legal basis, and information to borrowers",
    ),
    Obligation(
        "GDPR, articles 5(1)(c), 25 and 32",
        "data are minimised and protected by design",
        "report: What it costs the borrowers' privacy (mechanism, epsilon, delta, what rests on whom)",
        "the assessment of the risk that is left; no figure here says that a model is anonymous",
    ),
    Obligation(
        "GDPR, article 17",
        "personal data are erased where a person may ask for it",
        "logs hold salted digests only: erasing the salt erases them; erased bodies leave their hashes",
        "a released model is not unlearned by it",
    ),
    Obligation(
        f"{_MPC}, 7.6 evidence and logs",
        "each party keeps its logs and evidence of the computation, so that who broke the rules is found",
        "run/audit.db: exchanges by digest, cohorts, drop-outs, refusals with their rule; cosigned checkpoints",
        "logs of people's access to the institution's own systems",
    ),
    Obligation(
        f"{_MPC}, 7.5 communication",
        "parties authenticate each other and protect what they send by national cryptographic standards",
        "",
        "TLS and Ed25519 are used, and no SM2, SM3 or SM4",
    ),
    Obligation(
        f"{_ALGORITHM}, 6.1 and 8",
        "the aim of training shows no bias, and accuracy is evaluated",
        "run/metrics.json: groups, discrimination, calibration; the plan: protected columns are no features",
        "the judgement whether a difference between groups is justified",
    ),
    Obligation(
        f"{_ALGORITHM}, 6.4 traceability",
        "training data, the modelling process and its iterations can be traced, with checksums and times",
        "report: Where it comes from; run/rounds.jsonl; run/audit.db: the digest before and after each round",
        "source and sampling of the loans, which each lender documents: its log has their salted digest",
    ),
    Obligation(
        f"{_ALGORITHM}, 7 explainability",
        "features, model and results can be explained",
        "run/model/model.json: columns, bins and architecture",
        "reasons for a single decision, which the lender's scoring system gives",
    ),
)

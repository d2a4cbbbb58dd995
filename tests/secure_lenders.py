"""Lenders in this process and an honest coordinator of secure sums, step by step: a test can change any step."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import rosters
from lenders import lender_folder, open_lender, schema

from fedfin.client.folder import LenderFolder
from fedfin.credit.binning import bins_from_histogram, histogram_sensitivity, histogram_size
from fedfin.credit.models import architecture_of, initial_weights, largest_model, model_fingerprint
from fedfin.credit.score_counts import evaluation_cells, evaluation_sensitivity
from fedfin.plan import JobPlan
from fedfin.privacy.accounting import calibrate
from fedfin.privacy.combiner import Combiner
from fedfin.privacy.encoding import unpack
from fedfin.privacy.evaluation_noise import evaluation_scheme
from fedfin.privacy.shared_accounting import calibrate_shared, shared_sums
from fedfin.privacy.shares import publish
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of
from fedfin.roster_chain import RosterChain
from fedfin.strategies.sums import (
    bins_layout,
    bins_scheme,
    counts_layout,
    round_layout,
    round_scheme,
    shares_layout,
)
from fedfin.update import (
    Accepted,
    Advertised,
    AskHistogram,
    Confirm,
    Confirmed,
    Evaluate,
    Mask,
    Masked,
    Open,
    Propose,
    Refused,
    Shared,
    ShareKeys,
    Train,
    Unmask,
    Unmasked,
    decode,
    encode,
)

JOB = "secure-1234"
NAMES = tuple(f"bank-{letter}" for letter in "abcdef")


def secure_plan(mode="local", *, rounds=3, times=1, **sections):
    """A plan of a few quick rounds; mode shared with one step a round and one lender that may be lost."""
    shared = mode == "shared"
    return JobPlan.model_validate(
        {
            "training": {
                "rounds": rounds,
                "local_steps": 1 if shared else 2,
                "sample_rate": 0.5,
                # fewer loans than this: nobody is capped
                "weight_cap": 500,
                **sections.pop("training", {}),
            },
            "privacy": {
                "mode": mode,
                "epsilon": 2.0,
                **({"planned_dropouts": 1, "planned_colluders": 1} if shared else {}),
            },
            "cohort": {"min_lenders": 5},
            "evaluation": {"times": times},
            **sections,
        }
    )


def write_folders(directory: Path, names=NAMES, **policy) -> dict[str, Path]:
    """Write a lender's folder for each name, each with more loans than the one before; return the bank.yaml files."""
    return {
        name: lender_folder(
            directory / name, name=name, num_loans=140 + 20 * place, allow_no_privacy=True, **policy
        )
        for place, name in enumerate(names)
    }


def chain_of(banks) -> RosterChain:
    """Version 1 of these lenders, which each of their folders goes by already."""
    chain = rosters.founded({name: LenderFolder(bank).keys() for name, bank in banks.items()})
    for bank in banks.values():
        rosters.pin(bank.parent, chain)
    return chain


def refusal_of(lender, message) -> str:
    return decode(lender.answer(encode(message)), Refused).reason


@dataclass
class Cohort:
    """Lenders of one roster, and what the coordinator knows of their job."""

    banks: dict[str, Path]
    plan: JobPlan
    job: str = JOB
    lenders: dict = field(default_factory=dict)
    attempts: dict = field(default_factory=dict)
    dead: set = field(default_factory=set)

    def __post_init__(self):
        self.schema = schema()
        self.chain = chain_of(self.banks)
        self.roster = self.chain.last.roster()
        self.lenders = {name: open_lender(bank) for name, bank in self.banks.items()}
        if self.plan.privacy.mode == "shared":
            self.sums = shared_sums(
                self.plan,
                num_lenders=len(self.banks),
                num_cells=histogram_size(self.schema),
                num_features=len(self.schema.features),
                num_parameters=largest_model(self.plan.model, self.schema),
            )
            self.noise = calibrate_shared(
                self.plan.privacy,
                self.sums,
                sample_rate=self.plan.training.sample_rate,
                num_rounds=self.plan.training.rounds,
            )

    @property
    def mode(self):
        return self.plan.privacy.mode

    def proposal(self, chain=None):
        text = (self.chain if chain is None else chain).to_json()
        return Propose(self.job, self.plan.model_dump_json(), self.schema.fingerprint(), text)

    def accept(self):
        for lender in self.lenders.values():
            assert decode(lender.answer(encode(self.proposal())), Accepted).weight == 0.0
        return self

    def restart(self, name):
        """Stop a lender's process and start another one in its folder."""
        self.lenders[name].close()
        self.lenders[name] = open_lender(self.banks[name])

    # Questions

    def bins_question(self):
        return AskHistogram(self.job)

    def model(self, counts):
        """Bins and architecture of a summed histogram."""
        bins = bins_from_histogram(counts, self.schema, self.plan.model.max_bins)
        return bins, architecture_of(self.plan.model, self.schema, bins)

    def train_question(self, number, model, weights=None):
        bins, arch = model
        fingerprint = model_fingerprint(self.schema.fingerprint(), bins.fingerprint(), arch)
        start = initial_weights(arch, 0) if weights is None else weights
        return Train(self.job, number, bins.to_json(), fingerprint, start.astype(np.float32))

    def evaluate_question(self, number, model):
        question = self.train_question(1, model)
        return Evaluate(self.job, number, question.bins, question.fingerprint, question.weights)

    # Sums

    def scheme_of(self, question, num_lenders):
        match question:
            case AskHistogram():
                return bins_scheme(self.noise, self.sums, num_lenders)
            case Train():
                return round_scheme(self.noise, self.sums, len(question.weights), num_lenders)
            case Evaluate():
                return evaluation_scheme(
                    self.plan,
                    num_lenders=num_lenders,
                    num_cells=evaluation_cells(self.schema),
                    sensitivity=evaluation_sensitivity(self.schema),
                )

    def layout_of(self, question, num_lenders):
        if self.mode == "shared":
            return shares_layout(self.scheme_of(question, num_lenders))
        match question:
            case AskHistogram():
                stddev = 0.0
                if self.mode == "local":
                    training = self.plan.training
                    noise = calibrate(
                        self.plan.privacy, sample_rate=training.sample_rate, num_steps=self.plan.num_steps
                    )
                    stddev = noise.bins_noise_multiplier * histogram_sensitivity(self.schema)
                return bins_layout(self.plan, histogram_size(self.schema), num_lenders, stddev)
            case Train():
                return round_layout(self.plan, len(question.weights), num_lenders)
            case Evaluate():
                return counts_layout(evaluation_cells(self.schema), num_lenders)

    def start(self, question, names=None, **changes):
        """A new attempt at the question's stage."""
        names = tuple(sorted(self.banks if names is None else names))
        layout = self.layout_of(question, len(names))
        stage = stage_name(question)
        attempt = self.attempts.get(stage, -1) + 1
        self.attempts[stage] = attempt
        right = SumContext(
            federation="test",
            job_id=self.job,
            plan=self.plan.digest(),
            stage=stage,
            attempt=attempt,
            cohort=names,
            roster=roster_digest(self.roster.public_keys()),
            layout=layout.digest(),
            threshold=threshold_of(len(names)),
        )
        return OneSum(self, question, replace(right, **changes), layout)


def stage_name(question):
    match question:
        case AskHistogram():
            return "bins"
        case Train():
            return f"round {question.round}"
        case Evaluate():
            return f"evaluation {question.number}"


@dataclass(eq=False)
class OneSum:
    """One sum and its coordinator; lenders in `cohort.dead` are asked nothing."""

    cohort: Cohort
    question: object
    context: SumContext
    layout: object

    def __post_init__(self):
        self.id = self.context.digest().hex()
        self.combiner = Combiner(self.context, self.cohort.roster.public_keys(), self.layout.size)
        self.bytes = encode(self.question)
        self.refused = {}

    def ask(self, name, message, expected):
        """Ask one lender; None where it refuses."""
        answer = decode(self.cohort.lenders[name].answer(encode(message)), expected, Refused)
        if isinstance(answer, Refused):
            self.refused[name] = answer.reason
            return None
        assert getattr(answer, "sum", self.id) == self.id
        return answer

    def alive(self, names):
        return [name for name in sorted(names) if name not in self.cohort.dead]

    def open_message(self):
        return Open(self.cohort.job, self.context.to_bytes().decode())

    def open(self):
        for name in self.alive(self.context.cohort):
            if (answer := self.ask(name, self.open_message(), Advertised)) is not None:
                self.combiner.add_advert(name, answer.advert)
        return self

    def share_message(self):
        return ShareKeys(self.cohort.job, self.id, self.combiner.adverts())

    def share(self):
        message = self.share_message()
        for name in self.alive(message.adverts):
            if (answer := self.ask(name, message, Shared)) is not None:
                self.combiner.add_sealed(name, answer.sealed)
        return self

    def mask_message(self, name, data=None):
        asked = np.frombuffer(self.bytes if data is None else data, dtype=np.uint8)
        return Mask(self.cohort.job, self.id, self.combiner.sealed_for(name), asked)

    def mask(self):
        self.combiner.adverts()
        messages = {name: self.mask_message(name) for name in self.alive(self.combiner.sharers)}
        self.combiner.ask(self.bytes)
        for name, message in messages.items():
            if (answer := self.ask(name, message, Masked)) is not None:
                self.fold(name, answer)
        return self

    def fold(self, name, answer):
        self.combiner.fold(name, unpack(answer.values.tobytes(), self.layout.size, self.layout.ring_bits))

    def confirm_message(self, following=None):
        text = "" if following is None else following.context.to_bytes().decode()
        return Confirm(self.cohort.job, self.id, tuple(sorted(self.combiner.settle())), text)

    def confirm(self, following=None):
        message = self.confirm_message(following)
        for name in self.alive(message.survivors):
            if (answer := self.ask(name, message, Confirmed)) is not None:
                self.combiner.add_confirmation(name, answer.signature)
                if following is not None:
                    following.combiner.add_advert(name, answer.advert)
        return self

    def unmask_message(self, following=None):
        adverts = {} if following is None else following.combiner.adverts()
        return Unmask(self.cohort.job, self.id, self.combiner.confirmations(), adverts)

    def unmask(self, following=None):
        message = self.unmask_message(following)
        for name in self.alive(self.combiner.survivors):
            if (answer := self.ask(name, message, Unmasked)) is not None:
                self.combiner.add_shares(name, answer.shares)
                if following is not None:
                    following.combiner.add_sealed(name, answer.sealed)
        return self

    def total(self):
        return self.combiner.total()

    def whole(self):
        """Do everything; return the ring's total."""
        return self.open().share().mask().confirm().unmask().total()

    def parts(self, total):
        """The decoded sum; in mode shared with its noise checked and in the values' unit."""
        parts = self.layout.decode(total)
        if self.cohort.mode != "shared":
            return parts
        scheme = self.cohort.scheme_of(self.question, self.context.num_lenders)
        noised = parts["noised"].astype(np.int64)
        return {"noised": publish(noised, len(self.combiner.survivors), scheme)}

    def counts(self, total):
        parts = self.parts(total)
        return parts.get("counts", parts.get("noised"))

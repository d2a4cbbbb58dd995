"""A coordinator's whole job over real lenders in this process, any message of which can be lost, answered or killed."""

import atexit
import contextlib
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import rosters
from lender_log import logged
from lenders import open_lender, schema
from secure_lenders import NAMES, write_folders

from fedfin.audit.events import Exchange
from fedfin.client.folder import LenderFolder
from fedfin.client.preparation import prepare
from fedfin.errors import FedfinError
from fedfin.invitation import Invitation
from fedfin.plan import JobPlan
from fedfin.privacy.ledger import Ledger
from fedfin.server import delivery, gathering, rounds
from fedfin.server.exchange import Answers
from fedfin.server.jobs import choose_job
from fedfin.server.roster import FederationStore
from fedfin.server.rounds import run_job
from fedfin.update import Confirm, Mask, Message, Open, Refused, ShareKeys, Unmask, decode, encode

EXCHANGES = (Open, ShareKeys, Mask, Confirm, Unmask)
AWAY = "away"
"""The lender is not reached: it never sees the question."""
MUTE = "mute"
"""The lender answers, and its answer is lost."""


class Killed(BaseException):
    """The coordinator's process ends here; nothing after it is executed."""


def job_of(mode="none", *, rounds=3, times=0, min_lenders=4, **sections):
    """A quick job: six lenders have a threshold of five, and a plan's quorum below it."""
    shared = mode == "shared"
    return JobPlan.model_validate(
        {
            "training": {"rounds": rounds, "local_steps": 1, "learning_rate": 0.05},
            "privacy": {
                "mode": mode,
                "epsilon": 2.0,
                **({"planned_dropouts": 1, "planned_colluders": 1} if shared else {}),
            },
            "cohort": {"min_lenders": min_lenders, "start_timeout_s": 0.2, "round_deadline_s": 5.0},
            "evaluation": {"times": times},
            **sections,
        }
    )


def hurry(monkeypatch):
    """Let a coordinator in this process wait for nobody."""
    for module in (delivery, gathering, rounds):
        monkeypatch.setattr(module, "WAIT_S", 0.001)
    monkeypatch.setattr(rounds, "_EVALUATION_PAUSE_S", 0.001)


class WatchedStore(FederationStore):
    """The store, with a step of the process before and after every transaction that writes."""

    def __init__(self, path, on_step):
        super().__init__(path)
        self._on_step = on_step

    @contextlib.contextmanager
    def _write(self):
        self._on_step()
        with super()._write() as db:
            yield db
        self._on_step()


@cache
def _written():
    """Folders of all lenders, written once in a test run and copied for each test; and their loans, read once."""
    directory = Path(tempfile.mkdtemp(prefix="fedfin-lenders-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    banks = write_folders(directory, NAMES, min_cohort=3)
    return directory, {name: prepare(LenderFolder(bank)) for name, bank in banks.items()}


@dataclass
class Asked:
    """One set of questions that went out."""

    kind: type[Message]
    stage: str
    attempt: int
    names: tuple[str, ...]


@dataclass
class SecureHouse:
    """Lenders, the coordinator's store and what it said; the Exchange of the tests."""

    directory: Path
    names: tuple[str, ...] = NAMES
    away: set = field(default_factory=set)
    events: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    judged: list = field(default_factory=list)

    def __post_init__(self):
        written, loans = _written()
        for name in self.names:
            shutil.copytree(written / name, self.directory / name)
        self.banks = {name: self.directory / name / "bank.yaml" for name in self.names}
        # what is durable matters to a machine that dies, and none does here: only the order of the writes counts
        self._quick = contextlib.ExitStack()
        self._quick.enter_context(mock.patch("os.fsync", return_value=None))
        self._quick.enter_context(
            mock.patch("fedfin.client.lender.prepare", lambda folder: loans[folder.config.name])
        )
        self.lenders = {name: open_lender(bank) for name, bank in self.banks.items()}
        self.path = self.directory / "federation.db"
        self.store = FederationStore.create(self.path)
        for name in self.names:
            self.enrol(name)
        self.found(self.names)
        self.stages = {}
        self.on_step = lambda: None
        #: From (name, question, stage) to AWAY, MUTE, a reply in the place of the lender's, or None.
        self.fault = lambda name, question, stage: None
        #: From (name, reply) to the reply that arrives.
        self.spoil = lambda name, reply: reply

    def found(self, names):
        """Let version 1 of the roster have these members, who all signed it."""
        self.chain = rosters.founded({name: LenderFolder(self.banks[name]).keys() for name in names})
        with self.store._write() as db:
            db.execute("DELETE FROM roster_versions")
        self.store.versions.add(self.chain.versions[-1])
        for name in names:
            rosters.pin(self.banks[name].parent, self.chain)

    def enrol(self, name):
        invitation = Invitation.create(name, "fed.example:9092", "0" * 64)
        self.store.invite(invitation)
        keys = LenderFolder(self.banks[name]).keys()
        self.store.enrol(rosters.enrolled(name, keys), invitation.secret_hash())

    def restart(self, name):
        self.lenders[name].close()
        self.lenders[name] = open_lender(self.banks[name])

    # The Exchange

    def online(self):
        return frozenset(self.lenders) - self.away

    def ask(self, requests, expected, *, deadline_s, on_reply=None, fold=None, enough=None):
        self.on_step()
        answers = Answers(replies={}, failures={})
        self._note(requests)
        for name, question in requests.items():
            fault = AWAY if name in self.away else self.fault(name, question, self._stage_of(question))
            reply = None
            if isinstance(fault, Message):
                reply = fault
            elif fault != AWAY:
                reply = decode(self.lenders[name].answer(encode(question)), expected, Refused)
                reply = self.spoil(name, reply) if fault is None else None
            if reply is None:
                answers.failures[name] = f"no answer within {deadline_s:g} s"
                continue
            try:
                if fold is not None and isinstance(reply, expected):
                    fold(name, decode(encode(reply), expected))
                else:
                    answers.replies[name] = reply
            except FedfinError as error:
                answers.failures[name] = str(error)
            if on_reply is not None:
                on_reply(name)
        self.on_step()
        return answers

    def _note(self, requests):
        question = next(iter(requests.values()))
        stage, attempt = self._stage_of(question), 0
        if isinstance(question, Open):
            attempt = json.loads(question.context)["attempt"]
        self.asked.append(Asked(type(question), stage, attempt, tuple(sorted(requests))))

    def _stage_of(self, question):
        from fedfin.privacy.sum_context import SumContext

        for text in (getattr(question, "context", ""), getattr(question, "next", "")):
            if text:
                context = SumContext.from_bytes(text.encode())
                self.stages[context.digest().hex()] = context.stage
                if isinstance(question, Open):
                    return context.stage
        return self.stages.get(getattr(question, "sum", ""), "")

    # The coordinator

    def say(self, event):
        self.on_step()
        self.events.append(event)

    def run(self, plan, *, new_job=False):
        """What the ServerApp does at every start; returns the released checkpoint."""
        store = WatchedStore(self.path, self.on_step)
        job = choose_job(store, plan, new_job=new_job, say=self.say)
        return run_job(
            self,
            store,
            job,
            plan,
            schema(),
            identity=rosters.coordinator(),
            release=lambda _: self.on_step(),
            judged=self.judged.append,
            say=self.say,
        )

    # What a test looks at

    def said(self, event):
        return [line for line in self.events if line["event"] == event]

    def cohorts(self):
        return {line["round"]: tuple(line["cohort"]) for line in self.said("round_done")}

    def questions(self, kind, stage):
        return [asked.names for asked in self.asked if asked.kind is kind and asked.stage == stage]

    def opened(self, stage):
        """The attempts at which a stage was opened by itself."""
        return [asked.attempt for asked in self.asked if asked.kind is Open and asked.stage == stage]

    def journal(self, name, event):
        return logged(self.banks[name].parent, event)

    def released(self, name):
        """How often each stage's vector left this lender."""
        return Counter(
            event.stage for event in self.journal(name, Exchange) if event.step in ("masked", "released")
        )

    def charges(self, name):
        with Ledger(self.banks[name].parent / "ledger.db") as ledger:
            return Counter(entry.stage for entry in ledger.entries() if entry.kind == "commit")

    def close(self):
        for lender in self.lenders.values():
            lender.close()
        self._quick.close()

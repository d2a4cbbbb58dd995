"""A whole job over real lenders in this process, with the federation's log and lenders that witness it."""

import rosters
from lender_log import logged
from lenders import schema
from secure_house import SecureHouse

from fedfin.audit.log import AuditLog
from fedfin.audit.origins import COORDINATOR, coordinator_origin
from fedfin.client.folder import LenderFolder
from fedfin.client.lender import Lender
from fedfin.server.jobs import choose_job
from fedfin.server.journal import Journal
from fedfin.server.recording import Recorder
from fedfin.server.rounds import run_job
from fedfin.server.witnessing import WitnessedExchange
from fedfin.update import decode, encode, with_witness

ORIGIN = coordinator_origin("test", rosters.authority().fingerprint)


class WitnessedHouse(SecureHouse):
    """The house with the federation's log, and lenders that are shown nothing but by it."""

    def __post_init__(self):
        super().__post_init__()
        self.shown_to = lambda name, text: text
        self.said_by = lambda name, text: text
        for lender in self.lenders.values():
            lender.__class__ = Lender  # no test's coordinator in between
        self.log_path = self.directory / "audit.db"
        key = rosters.coordinator().key
        AuditLog.create(self.log_path, origin=ORIGIN, actor=COORDINATOR, key=key, side="coordinator").close()

    def restart(self, name):
        super().restart(name)
        self.lenders[name].__class__ = Lender

    def ask(self, requests, expected, **options):
        fold = options.pop("fold", None)
        carried = {
            name: decode(with_witness(encode(one), self.shown_to(name, one.witness)), type(one))
            for name, one in requests.items()
        }
        answers_of = self.spoil

        def spoil(name, reply):
            reply = answers_of(name, reply)
            return decode(with_witness(encode(reply), self.said_by(name, reply.witness)), type(reply))

        self.spoil = spoil
        try:
            return super().ask(carried, expected, fold=fold, **options)
        finally:
            self.spoil = answers_of

    def run(self, plan, *, new_job=False, transcripts=None):
        with AuditLog.open(self.log_path, key=rosters.coordinator().key) as log:
            journal = Journal(log)
            recorder = Recorder(journal, "0" * 64)
            recorder.reconcile(self.store)
            job = choose_job(self.store, plan, new_job=new_job, say=self.say)
            recorder.begin(job, plan, self.store.weights(job.job_id))

            def say(event):
                recorder.take(event)
                self.say(event)

            witnessed = WitnessedExchange(
                self, journal, members=self.store.members, statement=rosters.coordinator().statement, say=say
            )
            return run_job(
                witnessed,
                self.store,
                job,
                plan,
                schema(),
                identity=rosters.coordinator(),
                release=lambda final: say(
                    {"event": "released", "model": final.fingerprint, "rounds": final.round}
                ),
                judged=self.judged.append,
                say=say,
                transcripts=transcripts,
            )

    def log(self):
        return AuditLog.open(self.log_path, key=rosters.coordinator().key)

    def entries(self, kind):
        return logged(self.directory, kind)

    def witnesses(self):
        return {name: LenderFolder(bank).keys().witness.public_key() for name, bank in self.banks.items()}

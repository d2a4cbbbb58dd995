"""A coordinator that misbehaves in exactly one way: refused by the rule's name, logged by the lender, nothing revealed.

Every attack of `misbehaving.ATTACKS` runs twice: against lenders in memory, and (slow) against a running federation
of six lender processes, TLS and Flower's SuperLink, with the attacks in the place of the honest job's loop. Both are
held to the same table: who refuses, at which step, by which rule, and what the coordinator may have been told.
"""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import rosters
from federation import federation, shares
from lender_log import logged
from lenders import lender_folder, open_lender, schema
from misbehaving import ATTACKS, ME, NAMES, OTHER, PLAN, WITHOUT_LAST, run_attack
from secure_lenders import chain_of

from fedfin.audit.events import Refusal
from fedfin.client import lender as lender_module
from fedfin.client.preparation import prepare
from fedfin.errors import LinkError
from fedfin.server.exchange import Answers
from fedfin.update import Refused, decode, encode

BUT_ME = tuple(name for name in NAMES if name != ME)
BUT_OTHER = tuple(name for name in NAMES if name != OTHER)
POLICY = {"epsilon_limit": 100.0, "allow_no_privacy": True}

REFUSED = {
    "swapped_keys": {("share", "advert_signature"): BUT_OTHER, ("mask", "too_few_sharers"): (OTHER,)},
    "swapped_own_keys": {("share", "own_advert"): (ME,)},
    "unenrolled_in_the_cohort": {("open", "roster"): NAMES},
    "unenrolled_advert": {("share", "unenrolled"): NAMES},
    "small_cohort": {("open", "cohort_size"): NAMES[:4]},
    "few_adverts": {("share", "too_few_adverts"): (ME,)},
    "weak_threshold": {("open", "threshold"): NAMES},
    "altered_share": {("mask", "sealed_share"): (ME,)},
    "few_survivors": {
        ("confirm", "too_few_survivors"): NAMES[:4],
        ("unmask", "unknown_sum"): NAMES[:4],
    },
    "split_survivor_sets": {("unmask", "confirmation"): WITHOUT_LAST},
    "both_secrets": {("confirm", "once"): WITHOUT_LAST, ("unmask", "unknown_sum"): WITHOUT_LAST},
    "both_secrets_afterwards": {
        ("confirm", "once"): WITHOUT_LAST,
        ("unmask", "unknown_sum"): WITHOUT_LAST,
    },
    "few_shares_of_the_noise": {
        ("mask", "planned_noise"): (ME,),
        ("confirm", "too_few_survivors"): WITHOUT_LAST,
        ("unmask", "unknown_sum"): WITHOUT_LAST,
    },
    "second_question": {("mask", "charged"): (ME,)},
    "second_question_without_privacy": {("mask", "once"): (ME,)},
    "different_model": {("unmask", "confirmation"): NAMES},
    "different_model_hidden": {("unmask", "confirmation"): (ME,)},
    "replay_across_rounds": {
        ("share", "advert_signature"): (ME,),
        ("mask", "sealed_share"): (ME,),
        ("unmask", "confirmation"): NAMES,
    },
    "replay_across_jobs": {("share", "advert_signature"): (ME,), ("open", "other_job"): NAMES},
    "opened_twice": {("open", "attempt"): WITHOUT_LAST},
    "differencing_retry": {("open", "charged"): WITHOUT_LAST},
    "differencing_retry_without_privacy": {("mask", "differencing"): WITHOUT_LAST},
    "differencing_survivors": {
        ("confirm", "differencing"): WITHOUT_LAST,
        ("unmask", "unknown_sum"): WITHOUT_LAST,
    },
    "differencing_nearly": {("mask", "differencing"): WITHOUT_LAST},
    "ordinary_dropout": {},
    "changed_roster": {
        ("propose", "roster_quorum"): BUT_OTHER,
        ("propose", "membership"): (OTHER,),
        ("open", "PolicyRefusalError"): NAMES,
    },
    "invented_member": {("propose", "roster_quorum"): NAMES},
    "invented_founders": {("propose", "roster_quorum"): (ME,), ("propose", "membership"): BUT_ME},
    "forgotten_version": {("propose", "roster_quorum"): NAMES},
    "forged_coordinator": {("propose", "coordinator_key"): NAMES},
    "another_roster_in_the_context": {("open", "roster"): NAMES},
    "honest_round": {},
}
"""By attack: which step is refused by which rule, by whom; nothing else is refused."""

STEPS = {
    "propose": "Propose",
    "open": "Open",
    "share": "ShareKeys",
    "mask": "Mask",
    "confirm": "Confirm",
    "unmask": "Unmask",
}
OPENED = {  # stages that are rightly summed in the course of an attack: everything else must stay closed
    "both_secrets_afterwards": {("round 1", 0)},
    "different_model_hidden": {("round 1", 0)},  # but what is opened is noise: see its test
    "replay_across_rounds": {("round 1", 0)},
    "differencing_retry_without_privacy": {("round 1", 2)},
    "differencing_survivors": {("round 1", 0)},
    "ordinary_dropout": {("round 1", 0), ("round 2", 0)},
    "honest_round": {("round 1", 0)},
}


def test_the_table_is_of_all_attacks():
    assert set(REFUSED) == set(ATTACKS)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class InMemory:
    """Six lenders in this process, with folders, loans, keys and ledgers of their own."""

    def __init__(self, directory):
        for position, name in enumerate(NAMES):
            lender_folder(directory / name, name=name, num_loans=60 + 20 * position, **POLICY)
        self.banks = {name: directory / name / "bank.yaml" for name in NAMES}
        self.lenders = {name: open_lender(bank) for name, bank in self.banks.items()}
        self.chain = chain_of(self.banks)

    def ask(self, requests, expected, *, deadline_s):
        del deadline_s
        answers = Answers(replies={}, failures={})
        for name, request in requests.items():
            try:
                reply = self.lenders[name].answer(encode(request))
                answers.replies[name] = decode(reply, expected, Refused)
            except LinkError as error:
                answers.failures[name] = str(error)
        return answers

    def log(self, name):
        return logged(self.banks[name].parent)

    def close(self):
        for lender in self.lenders.values():
            lender.close()


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    read = {}

    def read_once(folder):
        """The loans of a folder; they stay as they are, and every attack is a job that would read them again."""
        if folder.directory not in read:
            read[folder.directory] = prepare(folder)
        return read[folder.directory]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lender_module, "prepare", read_once)
        cohort = InMemory(tmp_path_factory.mktemp("in-memory"))
        yield cohort
        cohort.close()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_lenders_in_memory_refuse(in_memory, name):
    found = run_attack(name, in_memory, schema(), in_memory.chain, rosters.coordinator())
    check(found, in_memory.log)


HOOK = """\
import sys

if "fedfin.server.app" in sys.orig_argv:
    sys.path.append({tests!r})
    import misbehaving

    misbehaving.as_server_app({results!r})
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Run all attacks against one running federation; return its lenders' logs, and the results by attack."""
    directory = tmp_path_factory.mktemp("running")
    hooks, results = directory / "hooks", directory / "results.jsonl"
    hooks.mkdir()
    tests = str(Path(__file__).parent)
    (hooks / "sitecustomize.py").write_text(HOOK.format(tests=tests, results=str(results)))
    with pytest.MonkeyPatch.context() as patch, federation(directory, PLAN.model_dump(mode="json")) as built:
        patch.setenv("PYTHONPATH", str(hooks))
        built.start_server()
        for name, rows in zip(NAMES, shares(len(NAMES)), strict=True):
            built.enrol(name, rows, **POLICY)
        for name in NAMES:
            built.start_lender(name)
        assert built.wait_for_end("server", timeout_s=800) == 0, built.tail("server")
    found = {line["attack"]: line for line in lines_of(results)}
    logs = {name: logged(built.directory / name) for name in NAMES}
    return SimpleNamespace(found=found, logs=logs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_the_lenders_of_a_running_federation_refuse(running, name):
    check(running.found[name], running.logs.__getitem__)


def check(found, log_of):
    """Hold one attack's result to the tables."""
    assert found["error"] == "", found["error"]
    assert found["failures"] == {}
    name, jobs = found["attack"], {found["job"], *(refusal["job"] for refusal in found["refusals"])}
    expected = {(lender, step, rule) for (step, rule), lenders in REFUSED[name].items() for lender in lenders}
    # in each lender's own log, by the rule's name, and nothing else
    refused = [
        (lender, event.asked, event.rule)
        for lender in NAMES
        for event in log_of(lender)
        if isinstance(event, Refusal) and event.job in jobs
    ]
    assert Counter(refused) == Counter((lender, STEPS[step], rule) for lender, step, rule in expected)
    # in words to the coordinator
    assert {(refusal["lender"], refusal["step"]) for refusal in found["refusals"]} == {
        (lender, step) for lender, step, _ in expected
    }
    rules = {(lender, step): rule for lender, step, rule in expected if rule != "PolicyRefusalError"}
    for refusal in found["refusals"]:
        rule = rules.get((refusal["lender"], refusal["step"]), "")
        assert refusal["reason"].startswith(rule)
    # nothing is revealed
    for told in found["sums"]:
        may_open = (told["stage"], told["attempt"]) in OPENED.get(name, set())
        for own_mask, mask_key in told["shares"].values():
            assert own_mask == 0 or mask_key == 0, "both secrets of one lender"
            assert may_open or max(own_mask, mask_key) < told["threshold"]
    if "summed" in found["notes"]:
        assert found["notes"]["summed"].startswith("no: ")
    if name == "different_model_hidden":
        assert 0.4 < found["notes"]["mean size in the ring"] < 0.6, "as good as uniform: masks are left in it"
    if name == "honest_round":
        assert found["notes"]["mean size in the ring"] < 0.1, "a sum of updates"
        assert found["sums"][0]["shares"] == {lender: [len(NAMES), 0] for lender in NAMES}
    if name == "both_secrets_afterwards":
        assert found["notes"]["shares told afterwards"] == []
    if name == "ordinary_dropout":
        assert found["notes"]["total"] > 0

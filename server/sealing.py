"""How a finished run is sealed: a copy of the federation's log, the roster it rests on, and a signed manifest.

It comes last, when the model was delivered or its lenders were waited for. Whatever was killed, a run that is finished
and not sealed is sealed at the next start.
"""

from pathlib import Path

from fedfin.audit.events import Seal
from fedfin.audit.sealing import is_sealed, seal_run
from fedfin.coordinator_key import CoordinatorIdentity
from fedfin.files import write_public
from fedfin.server.journal import Journal
from fedfin.server.roster import FederationStore
from fedfin.server.roster_signing import RosterBook

__all__ = ["seal_finished"]


def seal_finished(
    runs: Path, root_path: Path, store: FederationStore, identity: CoordinatorIdentity, journal: Journal
) -> tuple[str, ...]:
    """Seal every completed run that is not sealed yet; return their jobs.

    Args:
        runs: The folder of all runs.
        root_path: The federation's root certificate.
        store: Knows which jobs are completed, and their rosters.
        identity: The coordinator's.
        journal: The federation's log.

    Raises:
        AuditError: The log cannot be written or copied.
        ConfigError: A file cannot be written.
    """
    sealed: list[str] = []
    for job in store.jobs():
        folder = runs / job.job_id
        if job.status != "completed" or is_sealed(folder) or not (folder / "model").is_dir():
            continue
        chain = store.roster(job.job_id)
        if chain is None and (found := RosterBook(store, identity).chain()) is not None:
            chain = found.to_json()
        if chain is not None:
            write_public(folder / "roster.json", chain.encode())
        write_public(folder / "ca.pem", root_path.read_bytes())
        journal.flush()
        journal.log.checkpoint()
        journal.log.copy_to(folder / "audit.db")
        digest = seal_run(folder, job.job_id, identity.key)
        journal.write(Seal(run=job.job_id, manifest=digest))
        sealed.append(job.job_id)
    return tuple(sealed)

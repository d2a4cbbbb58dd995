"""`fedfin client --config bank.yaml`: one lender, one process, one lock."""

import importlib.metadata
import threading
from collections.abc import Callable
from pathlib import Path

from fedfin.audit.events import Clock, Failure, Policy, Service, bounded
from fedfin.client.app import make_app
from fedfin.client.folder import LenderFolder
from fedfin.client.lender import Lender
from fedfin.client.node import Node
from fedfin.client.renewing import CHECK_S, renew_if_due
from fedfin.errors import FedfinError

__all__ = ["serve"]


def serve(config_path: Path, *, once: bool, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Take part until `stop` is set, or, with `once`, until one job's model was received and judged.

    Raises:
        ConfigError: bank.yaml does not hold, or another process serves this folder.
        DataError: The loans break the schema.
        LinkError: The coordinator does not accept this lender.
    """
    folder = LenderFolder(config_path)
    keys = folder.keys()
    folder.check_names()
    with folder.lock():
        lender = Lender(folder, say)
        say(f"{folder.config.name}: {len(lender.loans.train)} loans train, {len(lender.loans.holdout)} judge")
        folder.journal.write(
            Service(
                action="started",
                release=importlib.metadata.version("fedfin"),
                snapshot=lender.loans.snapshot.digest,
            ),
            Policy(digest=folder.config.policy.digest()),
            Clock(source="system"),
        )
        failure: list[FedfinError] = []

        def judge() -> None:
            try:
                if lender.evaluate_pending() and once:
                    node.stop()
            except FedfinError as error:
                say(f"the model could not be judged: {error}")
                folder.journal.write(Failure(stage="evaluation", reason=bounded(str(error))))
                if once:
                    failure.append(error)
                    node.stop()

        node = Node(
            folder.config.coordinator,
            folder.root_path,
            (folder.directory / "certificate.pem", folder.directory / "keys" / "tls.key"),
            keys.node,
            make_app(lender),
            state_path=folder.directory / "node.json",
            say=say,
            idle=judge,
        )

        def renew() -> None:
            """Renew the certificate whenever it is due; what fails is tried again the next day."""
            while True:
                try:
                    renew_if_due(folder, say)
                except FedfinError as error:
                    say(f"this lender's certificate could not be renewed: {error}")
                if stop.wait(CHECK_S):
                    return

        threading.Thread(target=renew, daemon=True).start()

        def watch() -> None:
            stop.wait()
            node.stop()

        threading.Thread(target=watch, daemon=True).start()
        try:
            judge()  # of a model that was received before a stop
            node.run()
        finally:
            folder.journal.write(Service(action="stopped", release=importlib.metadata.version("fedfin")))
            say("stopped")
            lender.close()
            folder.journal.close()
        if failure:
            raise failure[0]

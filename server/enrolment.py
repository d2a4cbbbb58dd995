"""How a lender is enrolled: `/v1/enrol/root` and `/v1/enrol` on the public listener; `renewal` has what comes later.

The lender fetches the root certificate, compares it with the fingerprint of its token, then sends its public
keys over TLS pinned to that root, with the token's secret and a signature by each key (proof of possession).
The coordinator answers with the lender's certificate and the federation's schema. Secrets are not logged.
"""

import datetime as dt
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError

from fedfin.coordinator_key import CoordinatorStatement
from fedfin.enrolling import EnrolmentAnswer, EnrolmentRequest
from fedfin.errors import EnrolmentError, FedfinError
from fedfin.identity import CertificateAuthority
from fedfin.invitation import secret_hash
from fedfin.server.enrolled_keys import check_possession, keys_of
from fedfin.server.renewal import RenewalDesk
from fedfin.server.roster import FederationStore, Member

__all__ = ["EnrolmentDesk", "enrolment_app"]

_MAX_BODY: Final = 64 * 1024

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class EnrolmentDesk:
    """Checks requests and issues certificates; `on_member` tells the SuperLink of a new node."""

    def __init__(
        self,
        store: FederationStore,
        authority: CertificateAuthority,
        *,
        statement: CoordinatorStatement,
        schema_text: Callable[[], str],
        on_member: Callable[[Member], None],
    ) -> None:
        self._store = store
        self._authority = authority
        self._statement = statement
        self._schema_text = schema_text
        self._on_member = on_member

    @property
    def root_pem(self) -> bytes:
        """The root certificate, PEM."""
        return self._authority.root.public_bytes(serialization.Encoding.PEM)

    def enrol(self, body: bytes) -> EnrolmentAnswer:
        """Enrol a lender.

        Args:
            body: An `EnrolmentRequest` as JSON.

        Returns:
            The lender's certificate, the schema and the federation's name.

        Raises:
            EnrolmentError: The request is malformed, a key's possession is not proved, or the token is not
                accepted; the token is used up only when everything else holds.
        """
        try:
            request = EnrolmentRequest.model_validate_json(body)
            certificate_request = x509.load_pem_x509_csr(request.certificate_request.encode())
            keys = keys_of(request)
        except (ValidationError, UnsupportedAlgorithm, ValueError):
            msg = "the enrolment request is malformed; both sides must run the same release of fedfin"
            # from None: the original would print the secret it was given.
            raise EnrolmentError(msg) from None
        hashed = secret_hash(request.name, request.secret)
        before = self._store.enrolled_by(request.name, hashed)
        if before is None or (before.node_key, before.identity_key, before.witness_key) != tuple(
            keys.values()
        ):
            before = None
            self._store.check_invitation(request.name, hashed)
        check_possession(request, keys)
        if before is not None:
            # The same lender, token and keys: the first answer was lost on its way, and is given again.
            self._on_member(before)
            return self._answer(before.certificate)
        certificate = self._authority.issue_lender(certificate_request, request.name)
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        answer = self._answer(pem)
        member = Member(
            name=request.name,
            node_key=request.node_key,
            certificate=pem,
            identity_key=request.identity_key,
            witness_key=request.witness_key,
            signature=request.signatures["identity"],
        )
        self._store.enrol(member, hashed)
        self._on_member(member)
        return answer

    def _answer(self, certificate: str) -> EnrolmentAnswer:
        return EnrolmentAnswer(
            certificate=certificate,
            schema_text=self._schema_text(),
            federation=self._statement.federation,
            coordinator=self._statement.to_json(),
        )


def enrolment_app(
    desk: EnrolmentDesk, renewal: RenewalDesk
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Return the ASGI application that answers `/v1/enrol/root` (GET) and `/v1/enrol`, `/rotate`, `/renew` (POST)."""
    answers: dict[str, Callable[[bytes], dict[str, str]]] = {
        "/v1/enrol": lambda body: desk.enrol(body).model_dump(),
        "/v1/enrol/rotate": lambda body: {"certificate": renewal.rotate(body)},
        "/v1/enrol/renew": lambda body: {"certificate": renewal.renew(body)},
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/enrol/root" and scope["method"] == "GET":
            await _answer(
                send, 200, {"root": desk.root_pem.decode(), "time": dt.datetime.now(dt.UTC).isoformat()}
            )
            return
        answer = answers.get(scope["path"])
        if answer is None or scope["method"] != "POST":
            await _answer(send, 404, {"error": "there is nothing here"})
            return
        body = b""
        more = True
        while more:
            part = await receive()
            body += part.get("body", b"")
            more = part.get("more_body", False)
            if len(body) > _MAX_BODY or part["type"] == "http.disconnect":
                await _answer(send, 413, {"error": "the enrolment request is too long"})
                return
        try:
            await _answer(send, 200, answer(body))
        except EnrolmentError as error:
            await _answer(send, 403, {"error": str(error)})
        except FedfinError as error:
            await _answer(send, 500, {"error": f"the coordinator cannot enrol now: {error}"})

    return app


async def _answer(send: Send, status: int, body: dict[str, str]) -> None:
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})

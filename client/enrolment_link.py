"""A lender's requests to `/v1/enrol*`: one HTTPS request each, over TLS that only the federation's root vouches for."""

import http.client
import json
import socket
import ssl
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from fedfin.client.node import check_clock
from fedfin.errors import EnrolmentError, LinkError

__all__ = ["post", "request"]

_TIMEOUT_S: Final = 20.0
_MAX_ANSWER: Final = 8 * 1024 * 1024

_Answer = TypeVar("_Answer", bound=BaseModel)


def post(address: str, root_pem: bytes, path: str, body: BaseModel, answer: type[_Answer]) -> _Answer:
    """Send a document and return the answer.

    Args:
        address: host:port of the coordinator.
        root_pem: The federation's root certificate, the only one that is trusted.
        path: Under the public listener.
        body: The document.
        answer: The answer's type.

    Raises:
        EnrolmentError: The coordinator refuses, or somebody is in between; says why.
        LinkError: It cannot be reached, cannot answer now, or runs another release.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root_pem.decode())
    status, text = request(address, context, "POST", path, body.model_dump_json().encode())
    try:
        if status == 200:
            return answer.model_validate_json(text)
        reason = str(json.loads(text)["error"])
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        msg = (
            f"the coordinator's answer (status {status}) does not parse; both sides must run the same release"
        )
        raise LinkError(msg) from error
    if status != 403:
        raise LinkError(reason)  # the coordinator's own trouble: another try may succeed
    raise EnrolmentError(reason)


def request(
    address: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    """Send one request; return the status and the answer's body.

    Raises:
        EnrolmentError: The server's certificate does not verify.
        LinkError: The coordinator cannot be reached, or the clocks are too far apart.
    """
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=_TIMEOUT_S, context=context)
    try:
        connection.request(
            method, path, body=body, headers={"content-type": "application/json"} if body else {}
        )
        response = connection.getresponse()
        check_clock(response.getheader("date"))
        return response.status, response.read(_MAX_ANSWER)
    except ssl.SSLCertVerificationError as error:
        msg = (
            f"the server at {address} shows a certificate that the federation's root did not sign"
            f" ({error.verify_message}); somebody may be in between: nothing was sent, ask the coordinator"
        )
        raise EnrolmentError(msg) from error
    except (OSError, http.client.HTTPException, socket.gaierror) as error:
        msg = (
            f"the coordinator at {address} cannot be reached ({error}); it must run (`fedfin server`)"
            " for this, and a firewall must let this machine through"
        )
        raise LinkError(msg) from error
    finally:
        connection.close()

"""Which certificate a connection of the public listener showed: uvicorn verifies it, and keeps it to itself.

A lender shows its certificate on the Fleet API; who enrols has none yet, so that the listener asks for one and does not
insist: `FleetOnly` does, and holds it against the member's.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["CERTIFICATE", "ShownCertificate"]

CERTIFICATE: Final = "fedfin.certificate"
"""Where an ASGI scope has the DER of the certificate that the client showed; it is verified. Absent without one."""

_App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class ShownCertificate(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # uvicorn picks its base when imported
    """uvicorn's HTTP protocol, which also puts the client's certificate into each scope of its connection."""

    app: _App

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # as uvicorn's own
        """Read the certificate once a connection stands: it is the same for all requests on it."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        shown = connection.getpeercert(binary_form=True) if connection is not None else None
        inner = self.app

        async def with_certificate(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
            if shown is not None:
                scope[CERTIFICATE] = shown
            await inner(scope, receive, send)

        self.app = with_certificate

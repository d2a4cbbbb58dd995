"""The keys in a lender's request: of the right kinds, written in one way, and held by who sent them."""

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedfin.enrolling import EnrolmentRequest, RotationRequest
from fedfin.errors import EnrolmentError
from fedfin.identity import public_pem, verify_signature

__all__ = ["check_possession", "keys_of"]


def keys_of(request: EnrolmentRequest | RotationRequest) -> dict[str, str]:
    """Return the keys' PEM by role: node, identity, witness.

    Raises:
        EnrolmentError: A key is of another kind, or written otherwise than `public_pem` does.
        ValueError: A key does not parse, as does cryptography's UnsupportedAlgorithm.
    """
    keys = {"node": request.node_key, "identity": request.identity_key, "witness": request.witness_key}
    for role, pem in keys.items():
        key = serialization.load_pem_public_key(pem.encode())
        if role == "node":
            fits = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
        else:
            fits = isinstance(key, ed25519.Ed25519PublicKey)
        # One text a key: else the roster would take the same key twice, with a blank line more.
        if not fits or public_pem(key) != pem:  # type: ignore[arg-type]  # EC or Ed25519 where it fits
            msg = f"the {role} key is of another kind or form; run `fedfin client join` with this release of fedfin"
            raise EnrolmentError(msg)
    return keys


def check_possession(request: EnrolmentRequest | RotationRequest, keys: dict[str, str]) -> None:
    """Check that the sender holds the private key of each of the request's keys, which are three different ones.

    Raises:
        EnrolmentError: A signature is missing, malformed or another key's.
    """
    if set(request.signatures) != set(keys) or len(set(keys.values())) != len(keys):
        msg = "the enrolment must be signed by three different keys; run `fedfin client join` again"
        raise EnrolmentError(msg)
    for role, key in keys.items():
        try:
            signature = bytes.fromhex(request.signatures[role])
        except ValueError as error:
            msg = f"the signature of the {role} key is malformed; run `fedfin client join` again"
            raise EnrolmentError(msg) from error
        verify_signature(key, signature, request.transcript())

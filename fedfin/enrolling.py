"""What a lender and the coordinator say to each other at enrolment, and when keys or certificates are renewed."""

import json

from pydantic import BaseModel, ConfigDict, Field

from fedfin.invitation import LENDER_NAME_PATTERN, secret_hash

__all__ = [
    "CertificateAnswer",
    "EnrolmentAnswer",
    "EnrolmentRequest",
    "RenewalRequest",
    "RotationRequest",
]


class EnrolmentRequest(BaseModel):
    """What a lender sends; `signatures` are over `transcript`, hex."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=LENDER_NAME_PATTERN)
    secret: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    certificate_request: str = Field(max_length=4000)
    node_key: str = Field(max_length=1000)
    identity_key: str = Field(max_length=1000)
    witness_key: str = Field(max_length=1000)
    signatures: dict[str, str] = Field(max_length=3)

    def transcript(self) -> bytes:
        """Return the bytes that each key signs: everything but the signatures, with the secret as its hash."""
        body = self.model_dump(exclude={"signatures", "secret"})
        body["secret_hash"] = secret_hash(self.name, self.secret)
        return b"fedfin enrolment 1\n" + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


class EnrolmentAnswer(BaseModel):
    """What the coordinator answers: the lender's certificate (PEM), schema.yaml, the federation's name.

    `coordinator` is the authority's statement of the coordinator's identity key (`CoordinatorStatement.to_json`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: str
    schema_text: str
    federation: str = Field(pattern=LENDER_NAME_PATTERN)
    coordinator: str = Field(max_length=2000)


class RotationRequest(BaseModel):
    """New keys of a member; `rotation` is its old identity key's signature over `rotation_message`, hex.

    `signatures` are those of the new node, identity and witness keys over `transcript`, hex.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=LENDER_NAME_PATTERN)
    certificate_request: str = Field(max_length=4000)
    node_key: str = Field(max_length=1000)
    identity_key: str = Field(max_length=1000)
    witness_key: str = Field(max_length=1000)
    rotation: str = Field(pattern=r"^[0-9a-f]{128}$")
    signatures: dict[str, str] = Field(max_length=3)

    def transcript(self) -> bytes:
        """Return the bytes that each new key signs: everything but the signatures."""
        return _transcript(b"fedfin rotation request 1\n", self)


class RenewalRequest(BaseModel):
    """A member's new certificate for the TLS key that it is enrolled with; `signatures` has its identity key's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=LENDER_NAME_PATTERN)
    certificate_request: str = Field(max_length=4000)
    signatures: dict[str, str] = Field(max_length=1)

    def transcript(self) -> bytes:
        """Return the bytes that the identity key signs: everything but the signature."""
        return _transcript(b"fedfin renewal 1\n", self)


def _transcript(domain: bytes, request: BaseModel) -> bytes:
    body = request.model_dump(exclude={"signatures"})
    return domain + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


class CertificateAnswer(BaseModel):
    """What the coordinator answers to new keys or a renewal: the certificate, PEM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: str = Field(max_length=8000)

"""What an audit found: the ledger's claim, the attack's bounds, every check, and the verdict."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from fedfin.privacy.noise_checks import Check

__all__ = ["CONFIDENCE", "THREAT_MODEL", "AuditReport"]

CONFIDENCE: Final = 0.999  # of the whole verdict: all bounds and checks together
THREAT_MODEL: Final = (
    "The attacker sees the noisy sum of every step, knows every loan but the one in question, chooses the weights, and"
    " that loan is as harmful as the clipping allows. For the bound by steps it also knows who was drawn for a step;"
    " for the one-run bound it does not."
)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What the ledger claims, what the attack measured, and the verdict.

    Attributes:
        model: Kind of model.
        epsilon_plan: The plan's.
        delta: The plan's.
        claim_pld: Upper bound of the whole job by the ledger, PLD; what the verdict holds the attack against.
        claim_rdp: The same by RDP, to which plans are calibrated.
        noise_multiplier: Planned, of each step.
        sample_rate: Planned.
        num_steps: Steps of the whole job, as counted in the code's rounds.
        epsilon_by_steps: Lower bound of the whole job by single steps.
        mu_by_steps: Lower bound of one step's shift over its noise; the claim is 1 / noise_multiplier.
        num_guesses: Guesses about single steps.
        num_correct: Right ones.
        epsilon_by_one_run: Lower bound of the whole job by the one-run theorem.
        one_run_canaries: Canaries of that run.
        one_run_guesses: Guesses, fixed beforehand.
        one_run_correct: Right ones.
        checks: All statements that were tested beside the two bounds.
        seconds: Of the whole audit.
    """

    model: str
    epsilon_plan: float
    delta: float
    claim_pld: float
    claim_rdp: float
    noise_multiplier: float
    sample_rate: float
    num_steps: int
    epsilon_by_steps: float
    mu_by_steps: float
    num_guesses: int
    num_correct: int
    epsilon_by_one_run: float
    one_run_canaries: int
    one_run_guesses: int
    one_run_correct: int
    checks: tuple[Check, ...]
    seconds: float

    @property
    def epsilon_measured(self) -> float:
        """The larger of the two lower bounds."""
        return max(self.epsilon_by_steps, self.epsilon_by_one_run)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the audit fails, in words; empty when it passes."""
        bounds = (
            ("by single steps", self.epsilon_by_steps),
            ("in one run", self.epsilon_by_one_run),
        )
        found = [
            f"the attack {how} shows that epsilon is at least {epsilon:.3f}, and the ledger says {self.claim_pld:.3f}"
            for how, epsilon in bounds
            if epsilon > self.claim_pld
        ]
        return (*found, *(check.text for check in self.checks if not check.holds))

    @property
    def passed(self) -> bool:
        """Whether the claim withstood everything."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the report for --json."""
        return {
            **asdict(self),
            "checks": [check.to_json() for check in self.checks],
            "epsilon_measured": self.epsilon_measured,
            "measured_over_claim": self.epsilon_measured / self.claim_rdp,
            "confidence": CONFIDENCE,
            "threat_model": THREAT_MODEL,
            "relation": "add_or_remove_one",
            "failures": list(self.failures),
            "passed": self.passed,
        }

"""How updates of a cohort become the next model: pure functions."""

"""Evidence: what happened, kept so that nobody can change it unseen."""

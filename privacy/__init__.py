"""Pure privacy arithmetic: clip, noise, account, keep the ledger."""

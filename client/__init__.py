"""A lender's side: loans stay here; only a protected update leaves."""

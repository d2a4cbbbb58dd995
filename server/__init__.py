"""The coordinator's side: it runs rounds and never sees a loan."""

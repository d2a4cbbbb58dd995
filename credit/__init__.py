"""The domain: schemas, loans, bins, models and the metrics of credit."""

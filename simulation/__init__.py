"""Experiments: whole federations on one machine."""

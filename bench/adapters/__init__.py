"""Adapters against the libraries they stand in for, and against our own operators."""

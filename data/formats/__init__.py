"""Readers of the usual formats: each gives the same `Episode`; `open` recognises which one a path needs."""

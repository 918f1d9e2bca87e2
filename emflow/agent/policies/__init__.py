"""Policies: what to do next, as pure functions of results."""

"""Reductions: one file each."""

"""Profiles as files: shown, compared, imported from public tables."""

"""Showing what was captured to others: the Prometheus endpoint. No torch here."""

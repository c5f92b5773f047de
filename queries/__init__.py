"""Asking the store: SQL views, each in a file that begins with the question it answers. No torch here."""

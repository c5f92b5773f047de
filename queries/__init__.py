"""Asking the store: SQL views, each in a file that begins with the question it answers. No torch here."""

from lm_telemetry.queries.connect import Connection, connect
from lm_telemetry.queries.view import View, ViewColumn, list_views

__all__ = ["Connection", "View", "ViewColumn", "connect", "list_views"]

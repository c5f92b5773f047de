"""Showing what was captured to others: the Prometheus endpoint. No torch here."""

from lm_telemetry.exporters.naming import metric_name
from lm_telemetry.exporters.prometheus import PrometheusExporter

__all__ = ["PrometheusExporter", "metric_name"]

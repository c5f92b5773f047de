"""Showing what was captured to others: the Prometheus endpoint. No torch here."""

from lm_telemetry.exporters.prometheus import PrometheusExporter
from lm_telemetry.exporters.render import metric_name

__all__ = ["PrometheusExporter", "metric_name"]

"""Both formats, byte for byte those of prometheus_client, read by its strict parser and by promtool."""

import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from lm_telemetry.exporters.exposition import Exposition, expose

ANY_TEXT = st.text(st.one_of(st.sampled_from('"\\\n{}#, '), st.characters(codec="utf-8")), max_size=40)
ANY_NUMBER = st.one_of(st.floats(), st.integers(-(2**53), 2**53))


class Registry:
    def __init__(self, families):
        self._families = families

    def collect(self):
        return iter(self._families)


def families(values, number, meaning="what it is"):
    info = InfoMetricFamily("a_run", meaning, labels=["run_id"])
    info.add_metric([values[0]], {"model": values[1]})
    gauge = GaugeMetricFamily("a_wait_seconds", meaning, labels=["run_id", "layer"], unit="seconds")
    gauge.add_metric(values[:2], number)
    counter = CounterMetricFamily("a_events", meaning, labels=["run_id"])
    counter.add_metric([values[0]], 3, exemplar=Exemplar({"kind": values[1][:20]}, 1, 1.7e9))
    counter.add_metric([values[1] + "x"], 0.5)
    empty = GaugeMetricFamily("a_nothing", meaning, labels=["run_id"])
    return [info, gauge, counter, empty]


@given(st.lists(ANY_TEXT, min_size=2, max_size=2), ANY_NUMBER, ANY_TEXT)
def test_byte_for_byte_like_prometheus_client(values, number, meaning):
    made = families(values, number, meaning)
    exposition = expose(made)
    assert exposition.text == generate_latest(Registry(made))
    assert exposition.openmetrics == generate_openmetrics(Registry(made))


@given(ANY_TEXT)
def test_any_label_value_comes_back(value):
    made = families([value, value], 1.5)[:2]  # not the exemplars, in which this parser knows no escapes
    for page, parse in (
        (expose(made).text, text_string_to_metric_families),
        (expose(made).openmetrics, openmetrics_families),
    ):
        read = {f.name: f for f in parse(page.decode())}
        (sample,) = read["a_wait_seconds"].samples
        assert (sample.labels, sample.value) == ({"run_id": value, "layer": value}, 1.5)


def test_exemplars_stand_in_openmetrics_alone():
    exposition = expose(families(["r", "k"], 1))
    assert b'a_events_total{run_id="r"} 3.0 # {kind="k"} 1.0 1700000000.0\n' in exposition.openmetrics
    assert b'a_events_total{run_id="r"} 3.0\n' in exposition.text
    assert b" # " not in exposition.text


def test_nothing_is_a_page_too():
    assert expose([]) == Exposition()
    assert list(openmetrics_families(Exposition().openmetrics.decode())) == []


def test_promtool_has_no_complaint(full_page):
    promtool = shutil.which("promtool")
    if promtool is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("promtool is not installed (Debian: apt-get install prometheus)")
    checked = subprocess.run([promtool, "check", "metrics"], input=full_page.text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_strict_parser_reads_the_whole_page(full_page):
    strict = {f.name: f for f in openmetrics_families(full_page.openmetrics.decode())}
    plain = {f.name: f for f in text_string_to_metric_families(full_page.text.decode())}
    assert strict["lm_telemetry_run"].type == "info"
    assert strict["lm_telemetry_steps_seconds"].unit == "seconds"
    samples = [{(s.name, *sorted(s.labels.items())): s.value for f in page.values() for s in f.samples} for page in
               (strict, plain)]  # fmt: skip
    assert samples[0] == samples[1]
    assert len(samples[0]) > 100

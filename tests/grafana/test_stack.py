"""`lmt stack`: what it writes, that it overwrites nothing unasked, and that the servers' own tools take it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lm_telemetry.cli import main
from lm_telemetry.exporters.grafana.stack import SOURCE


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def lmt(tmp_path, monkeypatch, capsys):
    """`lmt(*words)` gives exit code, standard output and standard error; in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main(["stack", *words])
        return code, *capsys.readouterr()

    return run


def test_it_writes_everything(lmt, tmp_path):
    code, out, err = lmt("grafana", "--store", "my store")
    assert (code, err) == (0, "")
    written = files(tmp_path / "grafana")
    assert set(written) == set(files(SOURCE))
    for name, content in files(SOURCE).items():
        if name != "README.md":
            assert written[name] == content
    assert out.startswith(f"{len(written)} files written to {tmp_path / 'grafana'}\n")
    assert "lmt export --store 'my store'" in out
    assert (tmp_path / "grafana" / "prometheus" / "targets").is_dir()


def test_the_readme_has_the_users_own_paths(lmt, tmp_path):
    lmt("grafana", "--store", "s3://bucket/it's")
    text = (tmp_path / "grafana" / "README.md").read_text()
    assert "@" not in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    lmt export")]
    assert commands == [["lmt", "export", "--store", "s3://bucket/it's"]]
    assert f"PROMETHEUS_TARGETS={tmp_path / 'grafana' / 'prometheus' / 'targets'}\n" in text


def test_files_can_be_read_by_the_servers(lmt, tmp_path):
    """Prometheus and Grafana are other users in their containers; the umask here may be strict."""
    code = "import os, sys; os.umask(0o077); from lm_telemetry.cli import main; sys.exit(main(['stack', 'grafana']))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    for path in (tmp_path / "grafana").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_a_second_time_nothing_is_written(lmt, tmp_path):
    lmt("grafana")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grafana").rglob("*")}
    _, out, _ = lmt("grafana")
    assert out.startswith("0 files written")
    assert f"{len(files(SOURCE))} were there already" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "grafana").rglob("*")} == before


def test_what_was_changed_is_not_overwritten_unasked(lmt, tmp_path):
    lmt("grafana")
    compose, rules = tmp_path / "grafana/docker-compose.yml", tmp_path / "grafana/prometheus/rules/alerts.yml"
    compose.write_text("mine")
    rules.unlink()
    code, out, err = lmt("grafana")
    assert (code, out) == (1, "")
    assert "docker-compose.yml. Nothing was written" in err
    assert "--force" in err
    assert compose.read_text() == "mine"
    assert not rules.exists()
    code, out, _ = lmt("grafana", "--force")
    assert code == 0
    assert out.startswith("2 files written")
    assert compose.read_bytes() == (SOURCE / "docker-compose.yml").read_bytes()
    assert rules.exists()


def test_files_beside_it_are_left_alone(lmt, tmp_path):
    lmt("grafana")
    own = tmp_path / "grafana/prometheus/rules/mine.yml"
    own.write_text("groups: []")
    assert lmt("grafana", "--force")[0] == 0
    assert own.read_text() == "groups: []"


@pytest.mark.parametrize("name", ["elsewhere", "a $HOME: 'b'\" #c"])
def test_targets_elsewhere_are_scraped_and_mounted(lmt, tmp_path, name):
    code, out, _ = lmt("grafana", "--targets", name)
    place = str(tmp_path / name)
    assert code == 0
    assert Path(place).is_dir()
    assert shlex.quote(place) in out
    config = yaml.safe_load((tmp_path / "grafana/prometheus/prometheus.yml").read_text())
    assert config["scrape_configs"][0]["file_sd_configs"] == [{"files": [f"{place}/*.json"]}]
    compose = yaml.safe_load((tmp_path / "grafana/docker-compose.yml").read_text())
    mounts = [v for v in compose["services"]["prometheus"]["volumes"] if isinstance(v, dict)]
    escaped = place.replace("$", "$$")  # as compose wants it
    assert mounts == [{"type": "bind", "source": escaped, "target": escaped, "read_only": True}]


def test_promtool_takes_it_with_targets_elsewhere(lmt, tmp_path, promtool):
    lmt("grafana", "--targets", "else where")
    (tmp_path / "else where" / "r-0.json").write_text(json.dumps([{"targets": ["127.0.0.1:9108"], "labels": {}}]))
    out = promtool("check", "config", tmp_path / "grafana/prometheus/prometheus.yml")
    assert "WARNING" not in out
    assert "2 rule files found" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("file",), "cannot write"),
        (("file/in",), "cannot write"),
        (("grafana", "--targets", "a*b"), "takes *, ?, ["),
        (("grafana", "--targets", "file"), "cannot write"),
    ],
)
def test_what_cannot_be_done_is_said(lmt, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    code, out, err = lmt(*words)
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(("docker", "words"), [("/usr/bin/docker", "docker compose up -d"), (None, "no Docker here")])
def test_it_says_how_to_go_on(lmt, monkeypatch, docker, words):
    monkeypatch.setattr("shutil.which", lambda name: docker)
    assert words in lmt("grafana")[1]


def test_the_sdk_is_not_needed(tmp_path):
    code = (
        "import sys; sys.modules['grafana_foundation_sdk'] = None; from lm_telemetry.cli import main;"
        " main(['stack', 'grafana']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_the_compose_file_is_careful():
    compose = yaml.safe_load((SOURCE / "docker-compose.yml").read_text())
    prometheus, grafana = (compose["services"][name] for name in ("prometheus", "grafana"))
    for service in (prometheus, grafana):
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["network_mode"] == "host"
        assert "127.0.0.1" in service["healthcheck"]["test"][-1]
        own = [v.split(":")[0].removeprefix("./") for v in service["volumes"] if v.startswith("./")]
        assert all((SOURCE / name).is_dir() for name in own)
        assert all(v.endswith(":ro") for v in service["volumes"] if v.startswith("./"))
    assert "--web.listen-address=127.0.0.1:9090" in prometheus["command"]
    settings = grafana["environment"]
    assert settings["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not [name for name in settings if "PASSWORD" in name]
    assert all(isinstance(value, str) for value in settings.values())
    # What is provisioned is where it is mounted.
    mounted = dict(v.split(":")[:2][::-1] for v in grafana["volumes"])
    assert mounted[settings["LM_TELEMETRY_DASHBOARDS"]] == "./dashboards"
    home = Path(settings["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert mounted[str(home.parent)] == "./dashboards"
    assert (SOURCE / "dashboards" / home.name).exists()


def test_provisioning_leads_to_the_files():
    (source,) = yaml.safe_load((SOURCE / "provisioning/datasources/lm-telemetry.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    config = yaml.safe_load((SOURCE / "prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((SOURCE / "provisioning/dashboards/lm-telemetry.yml").read_text())["providers"]
    assert provider["options"]["path"] == "$LM_TELEMETRY_DASHBOARDS"

"""Credentials and certificates: what is let in, what is refused, and that no secret is told."""

import base64
import ssl
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters.access import Access, Credentials


def basic(user, password, encoding="utf-8"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode(encoding)).decode()


@pytest.fixture
def credentials(tmp_path):
    path = tmp_path / "auth"
    path.write_text("# who may read\n\nbearer s3same\n  BASIC grafana:open:sesame \nbasic ö:ü\n")
    return Credentials.read(str(path))


@pytest.mark.parametrize(
    "header",
    ["Bearer s3same", "bearer s3same", "BEARER  s3same ", basic("grafana", "open:sesame"), basic("ö", "ü")],
)
def test_who_is_let_in(credentials, header):
    assert credentials.admit(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "s3same",
        "Bearer",
        "Bearer ",
        "Bearer s3sam",
        "Bearer s3same2",
        "Basic s3same",
        "Basic !!!",
        "Basic grafana:open:sesame",
        basic("grafana", "open"),
        basic("Grafana", "open:sesame"),
        basic("ö", "ü", "latin-1"),
        "Bearer " + base64.b64encode(b"grafana:open:sesame").decode(),
        "Bearer grafana:open:sesame",
        "Digest s3same",
    ],
)
def test_who_is_not(credentials, header):
    assert not credentials.admit(header)


@given(st.text(st.characters(codec="latin-1"), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_judged(credentials, header):
    known = header.lower().startswith("bearer ") and header[7:].strip() == "s3same"
    assert credentials.admit(header) is known


def test_the_challenge_names_what_is_known(tmp_path, credentials):
    assert credentials.challenge == 'Basic realm="lm-telemetry", charset="UTF-8", Bearer realm="lm-telemetry"'
    path = tmp_path / "one"
    path.write_text("bearer x")
    assert Credentials.read(str(path)).challenge == 'Bearer realm="lm-telemetry"'


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        SECRET,
        f"token {SECRET}",
        "bearer",
        f"bearer {SECRET} {SECRET}",
        f"basic {SECRET}",
        f"basic :{SECRET}",
        f"bearer x\n{SECRET}",
        f"\udcff {SECRET}",
    ],
)
def test_a_file_that_says_something_else_is_refused_and_its_secrets_are_not_told(tmp_path, text):
    path = tmp_path / "auth"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError) as caught:
        Credentials.read(str(path))
    assert caught.value.setting == "prometheus_auth"
    assert str(path) in str(caught.value)
    error = caught.value
    assert SECRET not in f"{error} {error!r} {vars(error)} {error.__cause__!r} {error.__context__!r}"


def test_secrets_are_not_kept(credentials):
    assert "s3same" not in repr(credentials)
    assert all(len(digest) == 32 for digest in credentials.digests)


def test_tls(certificates):
    access = Access.load(certificate=certificates["server"], key=certificates["server_key"])
    assert (access.scheme, access.asks_who) == ("https", False)
    assert access.tls.minimum_version == ssl.TLSVersion.TLSv1_2
    mutual = Access.load(
        certificate=certificates["server"], key=certificates["server_key"], client_ca=certificates["ca"]
    )
    assert mutual.asks_who


def test_certificate_and_key_may_share_a_file(certificates, tmp_path):
    both = tmp_path / "both.pem"
    both.write_text("".join(Path(certificates[name]).read_text() for name in ("server", "server_key")))
    assert Access.load(certificate=str(both)).scheme == "https"


@pytest.fixture
def files(certificates, tmp_path):
    """Arguments of `Access.load`, whose files a test may change."""
    given = {"certificate": "server", "key": "server_key", "client_ca": "ca"}
    for name, source in given.items():
        (tmp_path / name).write_bytes(Path(certificates[source]).read_bytes())
    (tmp_path / "auth").write_text("bearer s3same\n")
    return {name: str(tmp_path / name) for name in (*given, "auth")}


def put(path, content):
    """As those do who renew: another file takes the name."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.replace(path)


def test_unchanged_files_are_not_read_again(files):
    access = Access.load(**files)
    assert access.renewed() is access
    assert Access().renewed() == Access()


def test_a_token_that_was_changed_counts(files):
    access = Access.load(**files)
    Path(files["auth"]).write_text("bearer newer\n")
    renewed = access.renewed()
    assert renewed.credentials.admit("Bearer newer")
    assert not renewed.credentials.admit("Bearer s3same")
    assert renewed.renewed() is renewed


@pytest.mark.parametrize("harm", ["gone", "half", "other"])
@pytest.mark.parametrize("name", ["certificate", "key", "client_ca", "auth"])
def test_what_cannot_be_used_leaves_what_there_was(files, certificates, name, harm, caplog):
    access = Access.load(**files)
    path, before = Path(files[name]), Path(files[name]).read_bytes()
    other = {"key": certificates["client_key"], "certificate": certificates["client"]}
    match harm:
        case "gone":
            path.unlink()
        case "half":
            put(path, before[:5])
        case "other":
            put(path, Path(other[name]).read_bytes() if name in other else b"\n")
    kept = access.renewed()
    assert (kept.tls, kept.credentials) == (access.tls, access.credentials)
    assert kept.asks_who
    assert kept.renewed() is kept
    assert len(caplog.records) == 1
    assert "stays" in caplog.text
    assert files[name] in caplog.text or files["certificate"] in caplog.text
    assert "s3same" not in caplog.text
    put(path, before)
    assert kept.renewed().tls is not access.tls, "mended files are read again"


def test_by_default_nothing_is_asked(credentials):
    assert (Access().scheme, Access().asks_who) == ("http", False)
    assert Access(credentials=credentials).asks_who


@pytest.mark.parametrize(
    ("files", "setting"),
    [
        ({"key": "server_key"}, "prometheus_key"),
        ({"client_ca": "ca"}, "prometheus_client_ca"),
        ({"certificate": "nowhere"}, "prometheus_certificate"),
        ({"certificate": "server", "key": "nowhere"}, "prometheus_key"),
        ({"certificate": "server"}, "prometheus_certificate"),
        ({"certificate": "server", "key": "client_key"}, "prometheus_certificate"),
        ({"certificate": "server", "key": "encrypted_key"}, "prometheus_certificate"),
        ({"certificate": "server_key", "key": "server_key"}, "prometheus_certificate"),
        ({"certificate": "server", "key": "server_key", "client_ca": "nowhere"}, "prometheus_client_ca"),
        ({"certificate": "server", "key": "server_key", "client_ca": "server_key"}, "prometheus_client_ca"),
        ({"auth": "nowhere"}, "prometheus_auth"),
    ],
    ids=str,
)
def test_files_that_cannot_be_used_are_named(certificates, files, setting):
    with pytest.raises(SettingsError, match=setting) as caught:
        Access.load(**{name: certificates.get(file, "/no/where") for name, file in files.items()})
    assert caught.value.setting == setting

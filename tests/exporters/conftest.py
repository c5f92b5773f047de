"""An exporter that is started and closed, rows to show it, and certificates."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lm_telemetry.catalogue import columns
from lm_telemetry.columns import to_table
from lm_telemetry.exporters import PrometheusExporter
from lm_telemetry.exporters.exposition import expose
from lm_telemetry.exporters.render import Latest
from lm_telemetry.writer import WriterStats


@pytest.fixture
def exporter():
    exporter = PrometheusExporter(0)
    exporter.start(run_id="r", rank=0, model_class="Llama")
    yield exporter
    exporter.close()


@pytest.fixture
def rows():
    def make(table, step, **columns):
        return to_table(table, columns, attempt=0, step=step, time_us=1_000_000 * step)

    return make


@pytest.fixture
def everything(rows):
    """Shows a `Latest` rows in every exported table."""

    def show(latest, layers=2, heads=4):
        def exported(table, count):
            return {m.name: [0.5] * count for m in columns(table) if m.exported and m.type != "int64"}

        latest.observe("steps", rows("steps", 9, **{m.name: [1] for m in columns("steps") if m.exported}))
        latest.observe("overhead", rows("overhead", 9, instrument=["attention"], seconds=[0.5], captures=[1]))
        latest.observe("runs", rows("runs", 9, max_overhead=[0.01], dtype=["float32"]))
        stack = {"stack": ["decoder"] * layers, "layer": list(range(layers))}
        for site in ("resid", "attn_out", "mlp_out", "embed"):
            values = {**exported("layers", layers), "site": [site] * layers, "nonfinite": [0] * layers}
            latest.observe("layers", rows("layers", 9, **stack, **values))
        wide = {name: [value for value in column for _ in range(heads)] for name, column in stack.items()}
        wide |= {"kind": ["self"] * layers * heads, "head": [*range(heads)] * layers}
        more = {"heads": {}, "key_mass": {}, "head_effects": {"ablation": ["mean"] * layers * heads}}
        for table, own in more.items():
            latest.observe(table, rows(table, 9, **wide, **own, **exported(table, layers * heads)))
        values = {**exported("representations", layers), "site": ["resid"] * layers}
        latest.observe("representations", rows("representations", 9, **stack, **values))
        latest.observe("params", rows("params", 9, name=["w"] * layers, **stack, **exported("params", layers)))
        curvature = {"operator": ["hessian"], "scope": ["all"], "estimator": ["lanczos"], "index": [0], "value": [3.0]}
        latest.observe(
            "curvature", rows("curvature", 9, **curvature, residual=[0.1], threshold=[4.0], converged=[True])
        )
        text = {"severity": ["warning"], "kind": ["k"], "message": ["m"], "fields": ["{}"]}
        latest.observe("events", rows("events", 9, **text))
        latest.flushed(WriterStats(rows=5, dropped_rows=2, dropped_captures=1))

    return show


@pytest.fixture
def full_page(everything):
    """A page with every family there is."""
    latest = Latest(run_id="r", rank=3, info={"model_class": "Llama"})
    everything(latest)
    return expose(latest.collect())


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Paths by name: `ca`, `server`, `client` and `stranger` (of another authority), each with `<name>_key`."""
    directory = tmp_path_factory.mktemp("certificates")
    paths, made = {}, {}

    def make(name, issuer, *, authority):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issued_by, issuer_key = made.get(issuer, (subject, key))
        now = datetime.now(UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=issued_by, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )
        made[name] = (subject, key)
        paths[name], paths[f"{name}_key"] = str(directory / f"{name}.pem"), str(directory / f"{name}.key")
        (directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (directory / f"{name}.key").write_bytes(_pem(key, serialization.NoEncryption()))
        return key

    make("ca", None, authority=True)
    make("other_ca", None, authority=True)
    key = make("server", "ca", authority=False)
    make("client", "ca", authority=False)
    make("stranger", "other_ca", authority=False)
    paths["encrypted_key"] = str(directory / "encrypted.key")
    (directory / "encrypted.key").write_bytes(_pem(key, serialization.BestAvailableEncryption(b"pw")))
    return paths


def _pem(key, encryption):
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

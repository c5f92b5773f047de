"""`lmt export` from outside: a process that Prometheus scrapes while a run writes, is killed, and is no more."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from busy_store import busy_store
from store_children import write_for_ever

from lm_telemetry.cli import main
from lm_telemetry.store import Store

LMT = [sys.executable, "-c", "import sys; from lm_telemetry.cli import main; sys.exit(main())"]


@pytest.fixture
def exported():
    """`exported(...)` starts `lmt export`; its process and the address that it prints."""
    started = []

    def start(*words):
        process = subprocess.Popen(
            [*LMT, "export", "--port", "0", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("metrics at http"), (line, process.poll())
        return process, line.removeprefix("metrics at ").strip()

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end(process, number=signal.SIGTERM):
    """Exit code and standard error."""
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    return process.returncode, error


def get(address, *, context=None, **headers):
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return answer.read().decode()


def eventually(look, patience=30):
    deadline = time.monotonic() + patience
    while True:
        found = look()
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def sample(text, name):
    found = re.search(rf"^lm_telemetry_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    return found and float(found[1])


@pytest.fixture
def prometheus(tmp_path):
    """`prometheus(address)` has a real Prometheus scrape it each second; `ask(query)` gives value by labels."""
    binary = shutil.which("prometheus")
    if binary is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("prometheus is not installed (Debian: apt-get install prometheus)")
    started = []

    def start(address):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = tmp_path / "prometheus.yml"
        target = urllib.parse.urlsplit(address).netloc
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: lm, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        words = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        started.append(
            subprocess.Popen(
                [binary, *words, f"--web.listen-address=127.0.0.1:{port}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

        def ask(query):
            url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
            try:
                result = json.loads(get(url))["data"]["result"]
            except OSError:
                return []
            return [float(entry["value"][1]) for entry in result]

        return ask

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


def test_prometheus_follows_a_run_that_writes_and_keeps_it_when_it_is_killed(tmp_path, exported, prometheus):
    # The exporter is there before the store.
    process, address = exported("--store", str(tmp_path / "store"), "--every", "0.3")
    ask = prometheus(address)
    assert "lm_telemetry_steps_loss" not in get(address)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    writer = context.Process(target=write_for_ever, args=(tmp_path / "store", theirs, None, 0.2), daemon=True)
    writer.start()
    try:
        assert eventually(lambda: ask("lm_telemetry_run_live") == [1])
        first = eventually(lambda: ask("lm_telemetry_steps_loss"))[0]
        assert eventually(lambda: (ask("lm_telemetry_steps_loss") or [0])[0] > first)
    finally:
        writer.kill()
        writer.join(20)
    assert eventually(lambda: ask("lm_telemetry_run_live") == [0])
    acknowledged = 0
    while ours.poll():
        acknowledged = ours.recv()
    # The value is the step. What was acknowledged is served; what was written just before the kill may be, too.
    assert eventually(lambda: sample(get(address), "steps_loss") >= acknowledged > 0)
    text = get(address)
    assert sample(text, "last_step") == sample(text, "steps_loss") == sample(text, "layers_rms")
    assert sample(text, "written_rows_total") >= acknowledged * 6
    assert eventually(lambda: ask("lm_telemetry_steps_loss") == [sample(text, "steps_loss")])
    assert ask('up{job="lm"}') == [1]
    assert ask("resets(lm_telemetry_written_rows_total[5m])") == [0]
    shutil.rmtree(tmp_path / "store")
    assert eventually(lambda: ask('lm_telemetry_export_failures_total{what="store"} > 0'))
    assert sample(get(address), "steps_loss") == sample(text, "steps_loss")
    code, error = end(process)
    assert code == 0
    first, second = error.splitlines()
    assert first.startswith("lmt: nothing of the store ")
    assert second.startswith("lmt: the store ")
    assert "all its runs are gone" in second


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path, exported, number):
    busy_store(tmp_path / "store")
    process, address = exported("--store", str(tmp_path / "store"))
    assert end(process, number) == (0, "")
    with pytest.raises(OSError, match="refused"):
        get(address)


def test_once_prints_the_page_and_promtool_has_nothing_to_say(tmp_path, capfd):
    busy_store(tmp_path / "store")
    assert main(["export", "--once", "--store", str(tmp_path / "store")]) == 0
    page, error = capfd.readouterr()
    assert error == ""
    assert set(re.findall(r'run_id="([^"]*)"', page)) == {"a", "2024", "older"}
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    assert main(["export", "--once", "--store", str(tmp_path / "store"), "--run", "a", "2024"]) == 0
    assert set(re.findall(r'run_id="([^"]*)"', capfd.readouterr().out)) == {"a", "2024"}


def test_once_fails_where_there_is_nothing_or_something_is_damaged(tmp_path, capfd):
    assert main(["export", "--once", "--store", str(tmp_path / "none")]) == 1
    assert capfd.readouterr().err == f"lmt: nothing of the store {tmp_path / 'none'} is served: it has no run yet\n"
    store = busy_store(tmp_path / "store")
    (store.partition("steps", "older", 0) / "part-0-0.parquet").write_bytes(b"damaged")
    assert main(["export", "--once", "--store", str(store.path)]) == 1
    page, error = capfd.readouterr()
    assert 'lm_telemetry_steps_loss{rank="0",run_id="a"}' in page
    assert error.startswith("lmt: run older cannot be read")
    assert error.count("\n") == 1


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path, capfd):
    store = Store.open_for_writing(tmp_path / "store")
    directory = store.path / "steps" / "run_id=\x1b]0;owned\x07" / "rank=0"
    directory.mkdir(parents=True)
    (directory / "part-0-0.parquet").write_bytes(b"damaged")
    assert main(["export", "--once", "--store", str(store.path)]) == 1
    assert "\x1b" not in capfd.readouterr().err


def test_it_asks_who_comes_and_speaks_tls(tmp_path, exported):
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run([*made.split(), "-addext", "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True)
    (tmp_path / "auth").write_text("bearer secret\n")
    process, address = exported(
        *("--store", str(tmp_path / "none"), "--auth", str(tmp_path / "auth")),
        *("--certificate", str(tmp_path / "cert.pem"), "--key", str(tmp_path / "key.pem")),
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(address, context=context)
    page = eventually(lambda: get(address, context=context, Authorization="Bearer secret"))
    assert sample(page, "export_left_out_runs") == 0
    assert end(process)[0] == 0


def test_an_open_address_is_told_of(tmp_path, exported):
    process, _ = exported("--store", str(tmp_path / "none"), "--host", "0.0.0.0")
    code, error = end(process)
    assert code == 0
    assert re.search(r"^lmt: whoever reaches http://\S+ can read the metrics; give --auth", error, re.MULTILINE)


def test_what_cannot_be_listened_on_or_used_is_refused(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["export", "--port", port, "--store", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lmt: cannot listen on 127.0.0.1:{port}: ")
    assert "--port" in error
    assert main(["export", "--auth", str(tmp_path / "none"), "--store", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("lmt: --auth: ")
    assert main(["export", "--key", "k", "--store", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "lmt: --key: k needs --certificate beside it\n"


@pytest.mark.parametrize(
    "words",
    [["--port", "65536"], ["--every", "0"], ["--every", "soon"], ["--since", "1y"], ["--max-runs", "0"], ["--run"]],
    ids=" ".join,
)
def test_options_that_mean_nothing_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *words])
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_neither_torch_nor_transformers_are_loaded(tmp_path):
    busy_store(tmp_path / "store")
    program = (
        "import sys\nfrom lm_telemetry.cli import main\ncode = main()\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), code, file=sys.stderr)\n"
    )
    words = ["export", "--once", "--store", str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stderr == "[] 0\n"

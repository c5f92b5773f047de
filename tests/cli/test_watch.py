"""`lmt watch` from outside: one frame into a pipe, and a real terminal over a run that is being written."""

import codecs
import fcntl
import multiprocessing
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from planted import plant
from store_children import write_for_ever

from lm_telemetry.store import Store

PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
from lm_telemetry.cli import main
sys.exit(main())
"""
LMT = [sys.executable, "-c", "import sys; from lm_telemetry.cli import main; sys.exit(main())"]
HIDE, SHOW, ENTER, LEAVE = "\x1b[?25l", "\x1b[?25h", "\x1b[?1049h", "\x1b[?1049l"


class Terminal:
    """`lmt watch` at a terminal of its own, 80 x 24."""

    def __init__(self, *words, **environment):
        self.end, terminal = pty.openpty()
        self.resize(80, 24)
        self.modes = termios.tcgetattr(terminal)
        self._terminal = terminal
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "watch", *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES", "NO_COLOR"}}
            | {"TERM": "xterm-256color"}
            | environment,
            start_new_session=True,
        )
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def resize(self, width, height):
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def until(self, holds, seconds=60):
        """What it has written since the last call, read on until that holds."""
        deadline = time.monotonic() + seconds
        while not holds(self.seen):
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"it did not come, only {self.seen[-2000:]!r}"
            self.seen += self._decoder.decode(os.read(self.end, 65536))
        found, self.seen = self.seen, ""
        return found

    def rest(self):
        """Its exit code, and all that it writes until then."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None or select.select([self.end], [], [], 0)[0]:
            assert time.monotonic() < deadline
            if select.select([self.end], [], [], 0.1)[0]:
                self.seen += self._decoder.decode(os.read(self.end, 65536))
        return self.process.returncode, self.seen

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.end)
        os.close(self._terminal)

    def is_as_before(self):
        return termios.tcgetattr(self._terminal) == self.modes


@pytest.fixture
def terminal():
    opened = []

    def start(*words, **environment):
        opened.append(Terminal(*words, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def live(tmp_path):
    """A store in which a run goes on."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    writer = context.Process(target=write_for_ever, args=(tmp_path / "live", theirs, 0, 0.1))
    writer.start()
    ours.recv()
    yield tmp_path / "live"
    writer.kill()
    writer.join()


def test_a_live_run_on_a_terminal_until_ctrl_c(live, terminal):
    shown = terminal("r", "--store", str(live), "--every", "0.2")
    first = shown.until(lambda text: "telemetry" in text and "step " in text)
    assert ENTER in first
    assert HIDE in first
    assert "LIVE" in first
    shown.until(lambda text: text.count("LIVE") >= 2)  # it is drawn again
    shown.resize(60, 30)
    resized = shown.until(lambda text: "LIVE" in text)
    assert "Traceback" not in resized
    shown.until(lambda text: "LIVE" in text)
    os.write(shown.end, b"\x03")
    code, last = shown.rest()
    assert code == 130
    assert last.rindex(SHOW) > last.rfind(HIDE)
    assert LEAVE in last
    assert shown.is_as_before()


@pytest.mark.parametrize(
    ("end", "code"),
    [(lambda shown: os.write(shown.end, b"q"), 0), (lambda s: s.process.send_signal(signal.SIGTERM), 143)],
)
def test_ways_to_leave(store, terminal, end, code):
    shown = terminal("--store", str(store.path))
    shown.until(lambda text: "telemetry" in text)
    end(shown)
    found, last = shown.rest()
    assert found == code
    assert last.rindex(SHOW) > last.rfind(HIDE)
    assert LEAVE in last
    assert shown.is_as_before()


def test_a_terminal_that_cannot_be_drawn_on_gets_one_frame(store, terminal):
    code, text = terminal("--store", str(store.path), TERM="dumb").rest()
    assert code == 0
    assert "\x1b" not in text
    assert text.startswith("first  over")


def test_colour_is_left_out_where_it_is_not_wanted(store, terminal):
    _, text = terminal("--once", "--store", str(store.path), NO_COLOR="1").rest()
    assert not any(f"\x1b[{style}m" in text for style in ("32", "1;33", "1;31", "36"))
    _, coloured = terminal("--once", "--store", str(store.path)).rest()
    assert "\x1b[32m" in coloured


def test_one_frame_into_a_pipe(lmt):
    code, out, err = lmt("watch")
    assert (code, err) == (0, "")
    assert out.startswith("first  over")
    assert "ALARM loss       NaN at step 3" in out
    assert "\x1b" not in out


def test_the_run_is_named_or_the_newest(lmt, store):
    plant(store, "steps", [{"step": 5, "loss": 1.0}], run_id="second")
    assert lmt("watch")[1].startswith("second  over")
    assert lmt("watch", "first")[1].startswith("first  over")
    code, out, err = lmt("watch", "fist")
    assert (code, out) == (1, "")
    assert "there is no run fist; near it: first" in err


def test_a_store_without_runs(tmp_path, lmt):
    empty = Store.open_for_writing(tmp_path / "empty")
    (empty.path / "_manifests").mkdir(exist_ok=True)
    code, out, _ = lmt("watch", store=empty.path)
    assert code == 0
    assert "waiting for a run to begin" in out
    assert lmt("watch", store=tmp_path / "nowhere")[0] == 1


@pytest.mark.parametrize("every", ["0", "nan", "inf", "x"])
def test_a_pause_that_is_none_is_refused(lmt, every, capsys):
    with pytest.raises(SystemExit):
        lmt("watch", "--every", every)
    assert "--every" in capsys.readouterr().err


def test_no_torch(store):
    program = (
        "import sys; from lm_telemetry.cli import main; main(['watch']); "
        "print({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    environment = os.environ | {"LM_TELEMETRY_STORE": str(store.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr in {"set()\n", "{'numpy'}\n"}  # which pyarrow brings

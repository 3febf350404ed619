from __future__ import annotations

import io
import subprocess
import sys

from rich.console import Console

from dinov2_fast.train.progress import Progress, format_duration

RECORD = {
    "step": 10,
    "loss": 9.25,
    "dino": 5.5,
    "ibot": 3.75,
    "koleo": None,
    "lr": 1e-3,
    "images_per_second": 12.5,
    "data_wait_share": 0.25,
    "memory_mib": 512.0,
}


def shown(console: Console, record: dict = RECORD, message: str = "") -> str:
    with Progress(100, 8, console=console) as progress:
        progress.log(record)
        progress.message(message)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_one_plain_line_per_record_however_narrow():
    text = shown(Console(file=io.StringIO(), width=20))
    first = text.splitlines()[0]
    assert first.startswith(
        "step  10/100  loss 9.2500  dino 5.5000  ibot 3.7500  koleo not finite  lr 1.00e-03  "
        "12.5 img/s  wait 25%  512 MiB  ETA "
    )
    assert "\x1b" not in text


def test_a_terminal_gets_a_live_line_in_colour_and_none_under_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=200))
    assert "\x1b[1;36m" in text
    assert "9.2500" in text
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=200))
    assert "\x1b[1;36m" not in text
    assert "9.2500" in text


def test_text_of_others_is_read_neither_as_markup_nor_by_the_terminal():
    text = shown(Console(file=io.StringIO(), width=200), message="[red]evil[/red] :smile: \x1b[2J")
    assert "[red]evil[/red] :smile: \\x1b[2J" in text
    assert "\x1b" not in text


def test_an_invisible_process_prints_nothing(capsys):
    with Progress(100, 8, visible=False) as progress:
        progress.log(RECORD)
        progress.message("hello")
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_does_not_end_the_run():
    script = (
        "from dinov2_fast.train.progress import Progress\n"
        "import sys, time\n"
        "with Progress(100, 8) as progress:\n"
        "    for step in range(1, 50):\n"
        "        progress.log({'step': step, 'loss': 1.0})\n"
        "        time.sleep(0.005)\n"
        "print('after', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "after\n"
    assert process.wait() == 0
    process.stderr.close()


def test_durations_are_readable():
    assert format_duration(59.6) == "0:01:00"
    assert format_duration(3 * 3600 + 62) == "3:01:02"
    assert format_duration(2 * 86400 + 5) == "2 d 0:00:05"

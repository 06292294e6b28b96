"""Signals are counted by their handlers, and raised where the program waits."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from visiontuner import interrupts


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


class Finaliser:
    """Python prints what is raised here, and goes on as if nothing had been."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        press(self.number)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_that_comes_in_a_finaliser_is_raised_by_the_next_check(number):
    before = signal.getsignal(number)
    with interrupts.handled():
        Finaliser(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()  # what ends in order may wait too
        press(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(number) is before


def test_a_signal_that_nobody_waited_for_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        press()
    interrupts.check()


WAITS = {
    "sleep": lambda: interrupts.sleep(10**6),
    "result": lambda: interrupts.result(Future()),
    "as_completed": lambda: list(interrupts.as_completed([Future()])),
    "call": lambda: interrupts.call(threading.Event().wait),
    "get": lambda: interrupts.get(queue.SimpleQueue(), None),
}


@pytest.mark.parametrize("wait", WAITS)
def test_every_wait_ends_with_a_signal(wait):
    with interrupts.handled():
        pressing = threading.Thread(target=press)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            WAITS[wait]()
        pressing.join()


def test_waits_give_what_they_wait_for():
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers.put(1)
    assert interrupts.get(answers, 0) == 1
    with pytest.raises(queue.Empty):
        interrupts.get(answers, 0)
    assert interrupts.call(lambda: 2) == 2
    with pytest.raises(ZeroDivisionError):
        interrupts.call(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        interrupts.call(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    futures = [interrupts.beside(lambda number=number: number) for number in range(3)]
    assert {future.result() for future in interrupts.as_completed(futures)} == {0, 1, 2}


def test_a_thread_is_not_interrupted():
    with interrupts.handled():
        press()
        interrupts.beside(interrupts.check).result()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


# Someone else's wait, that takes a lock again whatever signal comes.
STUCK = """
import os, threading
from visiontuner import interrupts

def leave():
    print("left", flush=True)
    os._exit(130)

with interrupts.handled(leave), {section}():
    print("here", flush=True)
    {wait}
"""
FOR_EVER = "threading.Event().wait()"


def stuck(section: str, wait: str = FOR_EVER) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(section=section, wait=wait)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_what_no_signal_wakes_is_left(number):
    process = stuck("threading.Lock")
    process.send_signal(number)
    assert process.communicate() == ("left\n", "")
    assert process.returncode == 130


def test_what_ends_in_order_is_left_with_the_second_signal_only():
    process = stuck("interrupts.in_order")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "Stopping in order. Once more ends it at once.\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("left\n", "")


def test_an_end_in_order_takes_its_time():
    """Nobody leaves it where a signal was noticed, and no other came."""
    wait = """
    try:
        interrupts.sleep(10**6)
    except KeyboardInterrupt:
        print("noticed", flush=True)
        input()
        print("ended")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(section="interrupts.in_order", wait=wait)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noticed\n"
    assert process.communicate("\n") == ("ended\n", None)
    assert process.returncode == 0


@pytest.fixture
def silent_server():
    """It takes connections and requests, and never answers; gives its address and a wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def asked() -> socket.socket:
            connection, _ = server.accept()
            connection.recv(1)
            return connection

        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (signal.SIGINT, ("query", "--local", "--url", "{address}", "{here}/red.png")),
        (signal.SIGTERM, ("prepare", "--data", "{address}/images.zip")),
        (signal.SIGHUP, ("tune", "--data", "{address}/images.zip")),
        (signal.SIGTERM, ("compare", "colours")),
    ],
)
@pytest.mark.slow
def test_a_command_that_waits_for_an_answer_ends_with_a_signal(
    arguments, number, silent_server, tmp_path, images, monkeypatch
):
    address, asked = silent_server
    (tmp_path / "red.png").write_bytes((images / "train/red/0.png").read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    process = subprocess.Popen(
        [sys.executable, "-m", "visiontuner"]
        + [argument.format(address=address, here=tmp_path) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "VISIONTUNER_CACHE": str(tmp_path / "cache")},
    )
    with asked():
        process.send_signal(number)
        output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Stopped." in output.splitlines()[-1]
    assert "Traceback" not in output

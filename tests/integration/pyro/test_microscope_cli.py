"""``emflow microscope``: serving, looking, aborting, stopping, and the file that `init` writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from emflow.microscope.protocol import Mode, Outcome, Scan4d, to_wire

SCAN = Scan4d(shape=(4, 4), step_nm=1.0, exposure_us=10.0)


def test_one_line_with_the_real_address_and_a_clean_end(scope) -> None:
    assert scope.log == f"emflow microscope small_scope:SmallScope listens on {scope.address}; Ctrl-C ends it\n"
    said = json.loads((scope.state / "address.json").read_text())
    assert said["address"] == scope.address
    assert scope.end() == 0
    assert not (scope.state / "address.json").exists()
    assert (scope.state / "backend" / "done.log").read_text().splitlines()[-1] == "close"
    assert scope.log.count("\n") == 1


def test_ctrl_c_while_a_scan_runs(make_scope, order) -> None:
    scope = make_scope(seconds=60.0).start()
    client = scope.client(patience_s=0.0)
    epoch = client.take_lease().epoch
    assert client._connection.call("execute", to_wire(order(1, SCAN, epoch=epoch)), 0.0)["outcome"] == "running"
    while client.status().mode is not Mode.BUSY:
        time.sleep(0.01)
    os.kill(scope.pid, signal.SIGINT)
    assert scope.process.wait(20) == 130
    scope.configure()
    scope.start()
    receipt = scope.client().receipt(order(1, SCAN, epoch=epoch).id)
    assert (receipt.outcome, receipt.code, receipt.reason) == (Outcome.ABORTED, "closed", "the server ends")


def test_looking_and_stopping(make_scope, order) -> None:
    scope = make_scope(lease_s=30.0).start()  # it must outlast eleven commands
    client = scope.client()
    client.execute(order(1, SCAN, epoch=client.take_lease().epoch))
    at = ("--address", scope.address)
    shown = scope.emflow("status", *at)
    assert shown.returncode == 0
    assert "small_scope:SmallScope: ready" in shown.stdout
    assert "C10_nm" in shown.stdout
    assert "agent one, epoch 1" in shown.stdout
    assert json.loads(scope.emflow("status", *at, "--json").stdout)["dose_e"] == 16000.0
    assert "C10_nm             -1000 to 1000, at most 500 at once" in scope.emflow("limits", *at).stdout
    assert json.loads(scope.emflow("limits", *at, "--json").stdout)["controls"]["C10_nm"]["max_step"] == 500.0
    events = [json.loads(line) for line in scope.emflow("events", *at, "--json").stdout.splitlines()]
    assert [e["name"] for e in events] == ["lease", "admitted", "began", "written", "noted", "ended"]
    assert "outcome done" in scope.emflow("events", *at, "--after", "5").stdout
    assert json.loads(scope.emflow("abort", *at, "--json").stdout)["mode"] == "ready"
    stopped = json.loads(scope.emflow("stop", *at, "-m", "smoke", "--json").stdout)
    assert (stopped["mode"], stopped["blanked"]) == ("stopped", True)
    assert stopped["reason"].endswith("smoke")
    assert json.loads(scope.emflow("release", *at, "--json").stdout)["mode"] == "ready"


def test_no_server_is_said(make_scope) -> None:
    scope = make_scope()
    done = scope.emflow("status", "--address", "127.0.0.1:9")
    assert (done.returncode, done.stdout) == (69, "")
    assert "no answer from 127.0.0.1:9" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--address", "0.0.0.0:0"), 78, "Until certificates come"),
        (("--backend", "simulatd"), 78, "did you mean 'simulated'"),
        (("--settings", "nothing.toml"), 78, "no such file"),
        (("--state", "share"), 2, "lie inside each other"),
    ],
)
def test_what_cannot_be_served(make_scope, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = make_scope().emflow("serve", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr


def test_backend_that_does_not_take_its_parameters(make_scope) -> None:
    done = make_scope(colour="red").emflow("serve")
    assert done.returncode == 78
    assert "does not take its parameters: unknown ['colour']" in done.stderr


def test_init_writes_what_serve_takes(make_scope) -> None:
    scope = make_scope()
    file = scope.folder / "microscope.toml"
    refused = scope.emflow("init")
    assert (refused.returncode, "is there already" in refused.stderr) == (2, True)
    assert scope.emflow("init", "--force").returncode == 0
    assert "Limits refuse, they never clip" in file.read_text()
    scope.state = scope.folder / "microscope-state"
    with subprocess.Popen(
        scope.command("serve", "--address", "127.0.0.1:0"), cwd=scope.folder, env=scope.environment(),
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        scope.process = process
        line = process.stdout.readline()
        assert line.startswith("emflow microscope simulated listens on 127.0.0.1:")
        process.terminate()
        assert process.wait(20) == 0

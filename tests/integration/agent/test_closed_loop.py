"""The loop over real processes: a command, its scan, its result, the decision, the next command."""

from __future__ import annotations

import json

import msgspec
import pytest

from emflow.agent.log import ExperimentLog
from emflow.agent.records import Decided, Received, Seen
from emflow.microscope.protocol import Set
from mpi_kernels.events import read_events

EXPERIMENT = "e0123456789ab"


def test_a_whole_experiment(lab) -> None:
    agent = lab.agent("--json")
    assert agent.wait() == 0, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert (summary["experiment"], summary["ending"]) == (EXPERIMENT, "target")
    assert (summary["acquisitions"], summary["decisions"]) == (3, 4)

    decided = lab.decisions()
    assert [d.by for d in decided] == ["policy"] * 4
    assert [len(d.commands) for d in decided] == [1, 2, 2, 0]
    sent = [c.id for d in decided for c in d.commands]
    assert lab.began() == sent  # each once, in order
    # the values that were set are those that the log says
    with lab.client() as client:
        wanted = decided[2].commands[0].action
        assert isinstance(wanted, Set)
        assert client.status().controls["C10_nm"] == wanted.values["C10_nm"]
        assert client.status().holder == ""  # the lease was given back

    # what was decided on is what the kernels wrote, and the notes lie beside it
    for seen in lab.progress().seen:
        folder = (lab.runs / seen.path).parent
        assert json.loads((folder / "decision.json").read_bytes())["based_on"] == [seen.job]
        assert (folder / "receipt.json").exists()
        assert seen.scalars["pattern"]["total"] > 0

    (own,) = lab.experiment().glob("events-*[0-9].jsonl")
    mine = list(read_events(own))
    assert [e.name for e in mine if e.name != "decided"].count("found") == 3
    assert [e.subject for e in mine if e.name == "sent"] == sent == [e.subject for e in mine if e.name == "received"]
    shares = [e.attrs["seconds"] for e in mine if e.name == "decided"][1:]
    assert max(shares) < 0.1, shares
    theirs = list(read_events(lab.experiment() / "events-microscope.jsonl"))
    assert {e.subject for e in theirs} == set(sent)
    assert [e.subject for e in theirs if e.name == "noted"] == [i for i in sent if i.endswith(("0000-00", "-01"))]

    replayed = lab.emflow("replay", EXPERIMENT)
    assert "4 decisions, all the same" in replayed.stdout
    assert lab.json("agent", "list")[0]["state"] == "target"
    again = lab.emflow("agent", "--experiment", EXPERIMENT, code=2)
    assert "has ended: target" in again.stderr


def test_the_truth_is_nowhere_that_the_agent_can_look(make_lab) -> None:
    """Not in what the microscope's server replies, nor in any file but those of the simulator itself."""
    lab = make_lab(parameters="hidden = { C10_nm = 123.271828, C12a_nm = -98.7271828, C12b_nm = 45.6271828 }")
    lab.microscope()
    lab.service()
    agent = lab.agent("-p", "results=2", "--json")
    assert agent.wait() == 0, agent.text()
    with lab.client() as client:
        told = [client.status(), client.limits(), client.events(0)]
        told += [client.receipt(c.id) for d in lab.decisions() for c in d.commands]
        lease = client.take_lease()
        told += [lease, client.renew(lease.epoch), client.stop("end"), client.release("end")]
    assert "271828" not in repr(told)
    own, settings = lab.folder / "microscope-state" / "backend", lab.folder / "microscope.toml"
    files = [p for p in lab.folder.rglob("*") if p.is_file() and p != settings and own not in p.parents]
    assert {"result.h5", "log.jsonl", "answers.jsonl"} <= {p.name for p in files}
    assert [p for p in files if b"271828" in p.read_bytes()] == []
    assert b"271828" in (own / "column.json").read_bytes()


def rewritten(lab, change) -> None:
    """The log with other records, its digests right again."""
    folder = lab.experiment()
    records = [change(r) for r in lab.records()]
    (folder / "log.jsonl").unlink()
    with ExperimentLog(folder) as log:
        log.append(*records)


def test_replay_finds_what_was_changed(lab) -> None:
    agent = lab.agent("-p", "results=2", "--json")
    assert agent.wait() == 0, agent.text()
    log = lab.experiment() / "log.jsonl"
    whole = log.read_bytes()

    # one character of a line
    log.write_bytes(whole.replace(b'"policy","based_on":["', b'"gate","based_on":["', 1))
    assert "was changed after it was written" in lab.emflow("replay", EXPERIMENT, code=1).stderr
    # a line that is gone
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:1] + whole.splitlines(keepends=True)[2:]))
    assert "was changed after it was written" in lab.emflow("replay", EXPERIMENT, code=1).stderr
    # a decision that the policy did not make, with its digests in order
    log.write_bytes(whole)

    def another_value(record):
        if isinstance(record, Decided) and record.number == 1:
            decision = msgspec.structs.replace(record.decision, measured={"value_nm": 1.0})
            return msgspec.structs.replace(record, decision=decision)
        return record

    rewritten(lab, another_value)
    told = lab.emflow("replay", EXPERIMENT, code=1)
    assert "1 of 3 decisions differ" in told.stdout
    assert "'value_nm': 1.0" in told.stdout
    assert [d["number"] for d in lab.json("replay", EXPERIMENT, code=1)["decisions"] if d["now"]] == [1]
    # commands that do not follow from the decision
    log.write_bytes(whole)

    def another_command(record):
        if isinstance(record, Decided) and record.number == 1:
            return msgspec.structs.replace(record, commands=record.commands[::-1])
        return record

    rewritten(lab, another_command)
    lab.emflow("replay", EXPERIMENT, code=1)
    # what the log says was there, and what its receipts say: another value that leads to the same decision
    for change in (
        lambda r: msgspec.structs.replace(r, settings=r.settings | {"C12a_nm": 3.0}),
        lambda r: msgspec.structs.replace(r, number=7),
        lambda r: msgspec.structs.replace(r, based_on=(*r.based_on, "0123456789abcdef-01")),
    ):
        log.write_bytes(whole)
        rewritten(lab, lambda r, c=change: c(r) if isinstance(r, Decided) and r.number == 2 else r)
        assert "does not follow from the log" in lab.emflow("replay", EXPERIMENT, code=1).stdout
    for change in (
        lambda r: msgspec.structs.replace(r, settings=r.settings | {"C12a_nm": 3.0}),
        lambda r: msgspec.structs.replace(r, acquisition="0123456789abcdef"),
        lambda r: msgspec.structs.replace(r, distrusted="all the same"),
    ):
        log.write_bytes(whole)
        rewritten(lab, lambda r, c=change: c(r) if isinstance(r, Seen) else r)
        assert "does not follow from the log" in lab.emflow("replay", EXPERIMENT, code=1).stdout
    # a result that was changed, and one that is gone
    log.write_bytes(whole)
    lab.emflow("replay", EXPERIMENT)
    result = lab.runs / lab.progress().seen[0].path
    data = bytearray(result.read_bytes())
    data[len(data) // 2] ^= 1
    result.write_bytes(bytes(data))
    assert "changed since it was decided on" in lab.emflow("replay", EXPERIMENT, code=1).stderr
    result.unlink()
    assert "No such file" in lab.emflow("replay", str(lab.experiment()), code=1).stderr


@pytest.mark.parametrize(
    ("rule", "ending", "acquisitions"),
    [
        ("max_acquisitions = 2", "budget of acquisitions", 2),
        ("max_dose_e = 110000.0", "budget of dose", 2),  # a scan of 16 frames of 100 us with 30 e/us: 48,000 e
        ("max_time_s = 0.001", "budget of time", 0),
    ],
)
def test_stop_rules(make_lab, rule: str, ending: str, acquisitions: int) -> None:
    lab = make_lab(agent=rule)
    lab.microscope()
    lab.service()
    agent = lab.agent("-p", "results=5", "--json")
    assert agent.wait() == 1, agent.text()
    summary = json.loads(agent.text().splitlines()[-1])
    assert (summary["ending"], summary["acquisitions"]) == (ending, acquisitions)
    # nothing of the last decision was sent: a correction that nobody could measure
    sent = {r.receipt.command for r in lab.records() if isinstance(r, Received)}
    assert not sent & {c.id for c in lab.decisions()[-1].commands}
    assert "all the same" in lab.emflow("replay", EXPERIMENT).stdout

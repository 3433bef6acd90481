"""`paceline data`: what it prints, its exit codes, and that a transfer goes on."""

import hashlib
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from deploy import data as command
from tasks.data import fetch as transfer
from tasks.data import text
from tasks.data.catalogue import CATALOGUE, RemoteFile
from tests.file_server import file_server
from tests.image_files import idx_set
from tests.text_files import sentences, table, write

TEXT = " ".join(sentences(200)).encode()
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    for console in (command.console, command.errors):
        monkeypatch.setattr(console, "width", 250)
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    text._tokenized.cache_clear()


@pytest.fixture
def server(monkeypatch):
    """Has Shakespeare, whose entry says so."""
    with file_server({"/input.txt": TEXT}) as running:
        files = (RemoteFile("shakespeare/input.txt", f"{running.url}/input.txt", len(TEXT), SHA256),)
        monkeypatch.setitem(CATALOGUE, "shakespeare", replace(CATALOGUE["shakespeare"], files=files))
        yield running


def run(tmp_path, *arguments):
    places = [f"task.data.root={tmp_path}/root", f"task.data.cache={tmp_path}/cache"]
    return CliRunner().invoke(command.data_app, [*arguments, *places])


def found(result):
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout)


def test_the_list_says_what_is_there_and_where_the_rest_comes_from(tmp_path):
    write(tmp_path / "root", {f"mnist/{name}": content for name, content in idx_set().items()})
    result = found(run(tmp_path, "list", "--json"))
    assert result["root"] == f"{tmp_path}/root"
    rows = {row["name"]: row for row in result["sets"]}
    assert list(rows) == list(CATALOGUE)
    assert {name for name, row in rows.items() if row["state"] == "embedded"} == {"digits", "glyphs", "pydoc"}
    assert {name for name, row in rows.items() if row["state"] == "here"} == {"mnist"}
    assert rows["cifar100"]["classes"] == 100
    assert rows["cifar100"]["bytes"] == 168_513_733
    assert "found none" in rows["svhn"]["why"]
    assert rows["imagenet16"]["by_hand"].startswith("log in")
    assert rows["wikipedia"]["bytes"] is None
    assert len(rows["wikipedia"]["files"]) == 41
    assert all(row["licence"] and row["from"] for row in rows.values())


def test_the_list_as_a_table(tmp_path):
    write(tmp_path / "root", {"lm1b/README": b"nothing of use"})
    result = run(tmp_path, "list")
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert set(CATALOGUE) <= set(lines)
    assert "embedded" in lines["pydoc"]
    assert "missing" in lines["lm1b"]
    assert "1.79 GB" in lines["lm1b"]
    assert "Apache 2.0" in lines["lm1b"]
    assert "statmt.org" in lines["lm1b"]
    *_, last, note = result.stdout.splitlines()  # one, because the others are not even begun
    assert last.startswith("└")
    assert note.startswith("lm1b: ")
    assert "lm1b/README" in note
    assert f"task.data.root = {tmp_path}/root" in result.stdout.replace("\n", "")


def test_the_list_without_a_root():
    result = CliRunner().invoke(command.data_app, ["list", "--json"])
    rows = {row["name"]: row["state"] for row in found(result)["sets"]}
    assert set(rows.values()) == {"embedded", "missing"}


def test_fetch_then_verify(tmp_path, server):
    result = run(tmp_path, "fetch", "shakespeare")
    assert result.exit_code == 0, result.output
    assert f"shakespeare: 1 files, {len(TEXT):,} bytes in place, {len(TEXT):,} transferred" in result.stdout
    assert "input.txt" in result.stderr  # its bar
    assert (tmp_path / "root/shakespeare/input.txt").read_bytes() == TEXT
    again = found(run(tmp_path, "fetch", "shakespeare", "--json"))
    assert again["files"] == [
        {"file": f"{tmp_path}/root/shakespeare/input.txt", "bytes": len(TEXT), "sha256": SHA256, "transferred": 0}
    ]
    result = run(tmp_path, "verify", "shakespeare")
    assert result.exit_code == 0, result.output
    assert f"root/shakespeare/input.txt: {len(TEXT):,} bytes, SHA-256 as published" in result.stdout
    assert "as 32k: " in result.stdout
    rows = {row["name"]: row for row in found(run(tmp_path, "list", "--json"))["sets"]}
    assert rows["shakespeare"]["state"] == "here"


def test_fetch_goes_on_where_it_was_cut_off(tmp_path, server):
    server.cuts = [1000] * transfer.TRIES
    result = run(tmp_path, "fetch", "shakespeare")
    assert result.exit_code == 1
    assert "5000 bytes are kept in" in result.stderr
    (file,) = found(run(tmp_path, "fetch", "shakespeare", "--json"))["files"]
    assert file["transferred"] == len(TEXT) - 5000


def test_what_is_embedded_needs_nothing(tmp_path):
    result = run(tmp_path, "fetch", "pydoc")
    assert (result.exit_code, result.stdout) == (0, "pydoc is embedded and needs nothing\n")
    assert found(run(tmp_path, "verify", "digits", "--json"))["findings"] == [
        {"subject": "digits", "ok": True, "message": "1797 images; embedded, needs nothing"}
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_exits_with_1_and_names_the_file_and_the_byte(tmp_path, as_json):
    files = {f"wikipedia/train-{index:05d}-of-00041.parquet": table(["x y z"] * 30) for index in range(2)}
    broken = sorted(files)[1]
    half = len(files[broken]) // 2
    write(tmp_path / "root", files | {broken: files[broken][:half]})
    result = run(tmp_path, "verify", "wikipedia", *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert f"{broken}: not a whole parquet file of {half} bytes: expected b'PAR1' at byte {half - 4}" in result.stdout
    if as_json:
        assert [finding["ok"] for finding in found(result)["findings"]] == [True, True, False]
    else:
        assert [line[:4] for line in result.stdout.splitlines()] == ["ok  ", "ok  ", "fail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "imagenet16"], "terms of access"),
        (["fetch", "minst"], "did you mean 'mnist'?"),
        (["verify", "minst"], "did you mean 'mnist'?"),
        (["fetch", "shakespeare", "--only", "*.zip"], "expected a pattern"),
        (["fetch", "shakespeare", "--source", "/nowhere"], "FileNotFoundError"),
        (["list", "task.data.rot=/x"], "task.data.rot"),
        (["fetch", "shakespeare", "task.data.root=null"], "data.root = None"),
    ],
)
def test_refusals_are_one_paragraph(tmp_path, arguments, message):
    if any(argument.startswith("task.") for argument in arguments):
        result = CliRunner().invoke(command.data_app, arguments)
    else:
        result = run(tmp_path, *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line

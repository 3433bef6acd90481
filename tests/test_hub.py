"""Optimizers are published to and loaded from a hub; what is said where it cannot be reached, or its client is missing.

huggingface_hub takes its endpoint from the environment when it is imported: the hub's users are processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lopt
from tests.fake_hub import fake_hub

ROOT = Path(__file__).parent.parent
PUBLISH = """
import lopt, torch
rule = lopt.SmallFcLopt(2)
theta = rule.init_theta(torch.Generator().manual_seed(3))
print(lopt.push_to_hub("me/tiny", rule, theta, {"run": "hub", "license": "MIT", "scores": {"final_loss": 1.25}}))
for source in ("hf://me/tiny", "hf:me/tiny", "me/tiny", "hf://me/tiny@main"):
    found, again, provenance = lopt.read(source)
    assert found.arguments == rule.arguments and provenance["scores"] == {"final_loss": 1.25}, source
    assert all(torch.equal(again[name], theta[name]) for name in theta)
assert lopt.from_hub("me/tiny", revision="main")[0].name == "small_fc_lopt"
assert lopt.read("google/velo_RNN")[0].arguments == {"lstm_size": 4, "bank_size": 2, "compat": True}
model = torch.nn.Linear(3, 2)
opt = lopt.load("me/tiny")(model.parameters())
model(torch.ones(3)).sum().backward()
opt.step()
for source in ("me/none", "hf://me/tiny@v9", "me/pickled"):
    try:
        lopt.read(source)
    except lopt.CheckpointError as error:
        print(source, "->", " ".join(str(error).split()))
"""
OFFLINE = """
import lopt, torch, sys
rule = lopt.SmallFcLopt(2)
theta = rule.init_theta(torch.Generator())
def told(what):
    try:
        what()
    except lopt.CheckpointError as error:
        print(" ".join(str(error).split()))
print(lopt.read("me/tiny")[2]["run"])
told(lambda: lopt.read("me/other"))
told(lambda: lopt.push_to_hub("me/tiny", rule, theta, {}))
sys.modules["huggingface_hub"] = None
told(lambda: lopt.read("me/tiny"))
told(lambda: lopt.push_to_hub("me/tiny", rule, theta, {}))
"""


def run(code, url, home):
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the hub after the user has published and read, what the user saw, the user's cache)."""
    directory = tmp_path_factory.mktemp("hub")
    rule = lopt.build("velo", lstm_size=4, bank_size=2, compat=True)
    lopt.export_pylo(directory, rule, rule.init_theta(torch.Generator().manual_seed(0)))
    with fake_hub() as hub:
        for half in ("RNN", "MLP"):
            files = {path.name: path.read_bytes() for path in (directory / f"VeLO_{half}").iterdir()}
            hub.commit(f"google/velo_{half}", files)
        hub.commit("me/pickled", {"pytorch_model.bin": b"\x80\x04.", "config.json": b"{}"})
        yield hub, run(PUBLISH, hub.url, directory / "home"), directory / "home"


def test_what_is_published_is_loaded_by_its_id(published):
    hub, said, _ = published
    assert said[0] == f"{hub.url}/me/tiny/commit/{hub.revision('me/tiny', 'main')}"
    assert hub.repos["me/tiny"]["main"].keys() == {"optimizer.safetensors", "config.json", "README.md"}


def test_a_repository_or_revision_that_does_not_exist_is_named(published):
    _, said, _ = published
    none, revision, pickled = said[1:]
    assert none.startswith("me/none -> hub repository 'me/none' could not be read")
    assert "revision 'v9'" in revision
    assert pickled.endswith("me/pickled: expected one *.safetensors file (pickles are never read), found none")


def test_pickles_are_not_even_downloaded(published):
    hub, _, _ = published
    assert any("/me/pickled/resolve/" in line for line in hub.log)
    assert not any("pytorch_model.bin" in line for line in hub.log)


def test_the_card_shows_license_use_numbers_and_provenance(published):
    hub, _, _ = published
    files = hub.repos["me/tiny"]["main"]
    card = files["README.md"].decode()
    assert card in hub.cards, "the hub was asked whether the front matter is valid"
    assert card.startswith("---\n")
    for expected in (
        'license: "mit"',
        'tags: ["learned-optimizer", "paceline", "small_fc_lopt"]',
        'lopt.load("hf://me/tiny")(model.parameters())\nopt.step()',
        "99 trainable",
        '"final_loss": 1.25',
        "arXiv:2203.11860",
    ):
        assert expected in card
    stated = json.loads(files["config.json"])
    assert stated["architecture"] == "small_fc_lopt"
    assert stated["provenance"]["run"] == "hub"


def test_the_card_of_an_optimizer_that_needs_a_loss_and_a_horizon_passes_them():
    from lopt.interchange.publish import model_card

    card = model_card("me/celo", lopt.Celo(phase=2), {})
    assert "(model.parameters(), num_steps=10_000)\nopt.step(closure)" in card
    assert "license" not in card.split("---")[1]


def test_without_a_network_the_cache_serves_and_the_rest_is_said(published):
    _, _, home = published
    run_name, unread, unwritten, no_client, no_client_to_write = run(OFFLINE, "http://127.0.0.1:9", home)
    assert run_name == "hub"
    assert unread.startswith("hub repository 'me/other' could not be read")
    assert "Connection refused" in unread
    assert unwritten.startswith("hub repository 'me/tiny' could not be written")
    assert no_client == no_client_to_write
    assert "pip install 'paceline[hub]'" in no_client

"""Publishing an optimizer: its file, its header as config.json, and a model card, in one commit to the hub.

Owns what a published repository contains. The way there is ``hub``'s.
"""

from __future__ import annotations

import json
from typing import Any

from lopt.base import LearnedOptimizer, Theta
from lopt.checkpoint import encode, header
from lopt.describe import Description
from lopt.interchange import hub

FILE = "optimizer.safetensors"


def push_to_hub(
    repo_id: str,
    lopt: LearnedOptimizer,
    theta: Theta,
    provenance: dict[str, Any],
    *,
    message: str = "Upload learned optimizer",
    private: bool = False,
) -> str:
    """Publish as ``owner/name``, for ``lopt.load("hf://owner/name")``; returns the commit's URL.

    ``provenance`` (run, config, scores, license, ...) goes into the file and onto the card. Raises ``ThetaError`` for a
    theta of another architecture and ``CheckpointError`` where huggingface_hub is missing or the hub refuses.
    """
    files = {
        FILE: encode(lopt, theta, provenance),
        hub.CONFIG: json.dumps(header(lopt, provenance), indent=2, sort_keys=True).encode() + b"\n",
        "README.md": model_card(repo_id, lopt, provenance).encode(),
    }
    return hub.upload(repo_id, files, message, private)


def model_card(repo_id: str, lopt: LearnedOptimizer, provenance: dict[str, Any]) -> str:
    """README.md of the repository: what it is, how it is used, where it comes from."""
    front: dict[str, object] = {"library_name": "paceline", "tags": ["learned-optimizer", "paceline", lopt.name]}
    if "license" in provenance:
        front["license"] = str(provenance["license"]).lower()
    # JSON is YAML, so no text of a provenance can break the front matter
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {repo_id}", ""]
    lines += [f"A learned optimizer: `{lopt.name}`, {lopt.paper}.", ""]
    steps = ", num_steps=10_000" if lopt.needs_horizon else ""
    step = "opt.step(closure)  # or: loss.backward(); opt.step(loss=loss)" if lopt.needs_loss else "opt.step()"
    lines += [
        "```python",
        "import lopt",
        f'opt = lopt.load("hf://{repo_id}")(model.parameters(){steps})',
        step,
        "```",
        "",
    ]
    lines += ["```text", str(Description.of(lopt, provenance)), "```", ""]
    lines += ["## Provenance", "", "```json", json.dumps(provenance, indent=2, sort_keys=True), "```", ""]
    return "\n".join(lines)

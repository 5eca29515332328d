"""card.py: the model card of a checkpoint, and the upload, with a stub in place of the hub."""

import json

import huggingface_hub
import pytest

import amft
import meta_lora
from card import check_hub, model_card, push_to_hub
from data import DataError
from tests.helpers import logged, run_here

LORA = [
    "--steps", "2", "--inner-steps", "2", "--tasks-per-step", "2", "--eval-every", "0",
    "--eval-tasks", "2", "--eval-problems", "2", "--gain-every", "0", "--no-eval-curve",
]  # fmt: skip


class Hub:
    """What is asked of huggingface_hub.HfApi."""

    logged_in, calls = True, []

    def whoami(self):
        if not self.logged_in:
            raise OSError("Token is required")

    def create_repo(self, repository, exist_ok):
        if repository == "not/mine":
            raise OSError("403 Forbidden")
        self.calls.append(("create", repository, exist_ok))
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path, ignore_patterns):
        files = sorted(p.name for p in folder_path.iterdir())
        self.calls.append(("upload", repo_id, files, ignore_patterns))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_a_run_is_uploaded_with_its_card(hub, tmp_path):
    folder = tmp_path / "run"
    assert run_here(meta_lora, *LORA, "--output-dir", folder, "--push-to-hub", "me/adapter") == 0
    (_, repository, exist_ok), (_, uploaded, files, ignored) = hub.calls
    assert (repository, exist_ok, uploaded, ignored) == (
        "me/adapter",
        True,
        "me/adapter",
        ["state/*"],
    )
    assert {"README.md", "adapter_model.safetensors"} <= set(files)
    card = (folder / "checkpoint" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "tiny"\n')
    assert 'library_name: "peft"' in card
    assert "Step 2 of a run of `meta_lora.py` on 1 rank(s)" in card
    assert f"--output-dir {folder}" in card
    assert "| --inner-steps | 2 |" in card
    evaluations = logged(folder, "evaluations.jsonl")
    task = next(iter(evaluations[-1]["tasks"]))
    before, after = (row["tasks"][task]["loss_after"] for row in (evaluations[0], evaluations[-1]))
    assert f"| {task} | loss_after | {before:.4g} | {after:.4g} |" in card
    early = model_card(folder, "meta_lora", 0)  # what came later is not known yet
    assert f"| {task} | loss_after | {before:.4g} | {before:.4g} |" in early


def test_uploads_that_fail(hub, monkeypatch, tmp_path, capsys):
    with pytest.raises(DataError, match="not/mine: 403 Forbidden; .* is kept"):
        push_to_hub(tmp_path, "not/mine")
    monkeypatch.setattr(Hub, "logged_in", False)
    assert run_here(amft, "--push-to-hub", "me/x", "--output-dir", tmp_path / "r") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "amft.py: --push-to-hub needs a login (hf auth login): Token is required"
    assert not (tmp_path / "r").exists()


ARGS = {
    "args": {"model": "tiny", "inner_steps": 5, "data": None},
    "versions": {"torch": "2.9", "python": "3.12"},
    "command": ["fomaml.py", "--inner-steps", 5],
    "ranks": 4,
}
CARD = """\
---
base_model: "tiny"
tags: ["fomaml"]
---
# run

Step 7 of a run of `fomaml.py` on 4 rank(s), from `tiny`, with torch 2.9, python 3.12:

    fomaml.py --inner-steps 5

## Evaluations

| task, or test set | measure | first | last |
|---|---|---|---|
| t | loss | 2.5 | 1.235 |
| t | count | - | 1234 |
| new | loss | - | 0.5 |

First: step 1, last: step 7.

## Settings

| flag | value |
|---|---|
| --model | tiny |
| --inner-steps | 5 |
| --data | None |
"""
ROWS = [
    {"step": 1, "tasks": {"t": {"loss": 2.5, "count": "?"}, "old": {"loss": 1.0}}},
    {"step": 4, "tasks": {"t": {"loss": 9.0}}},
    {
        "step": 7,
        "tasks": {
            "t": {"loss": 1.23456, "count": 1234, "steps": [1.0], "kind": "words"},
            "new": {"loss": 0.5},
        },
    },
    {"step": 8, "tasks": {"t": {"loss": 0.0}}},
]


def test_the_whole_card(tmp_path):
    """First and last evaluation up to its step; of numbers only."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / "evaluations.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert model_card(folder, "fomaml", 7) == CARD
    adapter = model_card(folder, "fomaml", 7, adapter=True)
    assert adapter == CARD.replace('"]\n---', '"]\nlibrary_name: "peft"\n---')
    evaluations = CARD[CARD.index("## Evaluations") : CARD.index("## Settings")]
    without = CARD.replace(evaluations, "").replace("Step 7", "Step 0")
    assert model_card(folder, "fomaml", 0) == without
    (folder / "evaluations.jsonl").unlink()
    assert model_card(folder, "fomaml", 0) == without


def test_what_a_link_points_to_is_uploaded(hub, tmp_path, monkeypatch):
    step = tmp_path / "step-000002"
    step.mkdir()
    (step / "model.safetensors").write_text("weights")
    (tmp_path / "checkpoint").symlink_to(step)
    folders = []
    upload = Hub.upload_folder

    def remember(self, repo_id, folder_path, ignore_patterns):
        folders.append(folder_path)
        upload(self, repo_id, folder_path, ignore_patterns)

    monkeypatch.setattr(Hub, "upload_folder", remember)
    assert push_to_hub(tmp_path / "checkpoint", "me/x") == "https://hub/me/x"
    assert folders == [step]
    assert check_hub() is None

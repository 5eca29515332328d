"""The model card of a checkpoint, and its way to the hub."""

import json
from pathlib import Path

from sources import DataError, reason_of


def model_card(run_folder: Path, project: str, step: int, adapter: bool = False) -> str:
    """README.md of a checkpoint at a step: command, settings, versions, what evaluations found.

    run_folder holds the run's args.json and evaluations.jsonl; project names the script.
    """
    record = json.loads((run_folder / "args.json").read_text(encoding="utf-8"))
    args, versions = record["args"], record["versions"]
    head = {"base_model": args["model"], "tags": [project]}
    if adapter:
        head["library_name"] = "peft"
    command = " ".join(map(str, record["command"]))
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        "---",
        f"# {run_folder.name}",
        "",
        f"Step {step} of a run of `{project}.py` on {record['ranks']} rank(s), from "
        f"`{args['model']}`, with {', '.join(f'{k} {v}' for k, v in versions.items())}:",
        "",
        f"    {command}",
        "",
        *evaluation_table(run_folder / "evaluations.jsonl", step),
        "## Settings",
        "",
        "| flag | value |",
        "|---|---|",
        *(f"| --{name.replace('_', '-')} | {value} |" for name, value in args.items()),
        "",
    ]
    return "\n".join(lines)


def evaluation_table(file: Path, step: int) -> list[str]:
    """The run's first and last evaluation up to a step, a row for each task or test set."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        if row["step"] <= step:
            rows.append(row)
    if not rows:
        return []
    lines = [
        "## Evaluations",
        "",
        "| task, or test set | measure | first | last |",
        "|---|---|---|---|",
    ]
    first, last = rows[0]["tasks"], rows[-1]["tasks"]
    for task, numbers in last.items():
        for name, value in numbers.items():
            if isinstance(value, int | float):
                before = first.get(task, {}).get(name)
                lines.append(f"| {task} | {name} | {shown(before)} | {shown(value)} |")
    return [*lines, "", f"First: step {rows[0]['step']}, last: step {rows[-1]['step']}.", ""]


def shown(value) -> str:
    """A count whole, a measure with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int) else "-"


def check_hub() -> None:
    """Raises DataError where nobody is logged in, before anything expensive."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as e:  # of many kinds: no token, a wrong one, no network
        raise DataError(f"--push-to-hub needs a login (hf auth login): {reason_of(e)}") from None


def push_to_hub(checkpoint: Path, repository: str) -> str:
    """Uploads a checkpoint without what only resuming needs; its address. Raises DataError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=checkpoint.resolve(), ignore_patterns=["state/*"]
        )
    except Exception as e:
        raise DataError(
            f"--push-to-hub {repository}: {reason_of(e)}; {checkpoint} is kept"
        ) from None
    return str(address)

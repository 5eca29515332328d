"""What several tests share: small models, random episodes, plain losses, runs of the scripts."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist

import amft
from data import Encoded, Episode, Example
from games.play import Turn
from games.rules import Result
from learner import Row
from model import load_config, local

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(),
    reason="needs the data folder ../shared, which is not part of the repository",
)


def hostile_rows() -> list[dict]:
    """Texts made to break a reader of answers."""
    lines = (SHARED / "checker" / "hostile.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# --------------------------------------------------------------------------------------------------
# Models


def small_llama(dtype: torch.dtype = torch.float64, **changes):
    """A random Llama. In float64 it has torch's own RMSNorm: the library's computes in float32, too
    coarse for differences."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    } | changes
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    norm = torch.nn.RMSNorm(settings["hidden_size"], 1e-6, dtype=dtype)
                    setattr(module, name, norm)
    with torch.no_grad():  # larger weights than the usual initialisation: gradients that matter
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3.0)
    return model


def save_small_model(folder: Path) -> Path:
    """Fills a folder with a random Llama of 60k parameters and the embedded tokenizer."""
    _, tokenizer = load_config("tiny")
    model = small_llama(
        torch.float32,
        vocab_size=len(tokenizer) + 8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of this rank's shard of every parameter."""
    return {name: local(p).clone() for name, p in model.named_parameters()}


def assert_same_weights(got: dict, expected: dict, what: str = "") -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        assert torch.equal(got[name], value), f"{what} {name}: not equal bit for bit"


# --------------------------------------------------------------------------------------------------
# Episodes and losses


def random_episodes(
    count: int, support_rows: int, query_rows: int, seed: int = 0, vocab: int = 64
) -> tuple[list[Episode], dict[str, Encoded]]:
    """Episodes of random tokens and lengths, and their token ids."""
    rng, tokens, episodes = random.Random(seed), {}, []
    for t in range(count):
        rows = []
        for i in range(support_rows + query_rows):
            example = Example("", "", "", "", 0, f"{t}/{i}")
            length, prompt_length = rng.randint(8, 40), rng.randint(2, 6)
            ids = [rng.randrange(vocab) for _ in range(length)]
            tokens[example.id] = Encoded(ids, prompt_length)
            rows.append(example)
        episodes.append(Episode(f"task{t}", rows[:support_rows], rows[support_rows:]))
    return episodes, tokens


def all_rows(episodes: list[Episode]) -> list[Example]:
    """Support and query rows of all episodes."""
    rows = []
    for episode in episodes:
        rows += episode.support + episode.query
    return rows


def chunks(rows: list, size: int) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def functional(model, weights: dict):
    """ids -> logits of the model with other weights."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits

    return forward


def reference_loss(forward, rows: list[Encoded]) -> torch.Tensor:
    """Mean over response tokens, row by row without padding: independent of collate and
    token_losses."""
    losses = []
    for row in rows:
        ids = torch.tensor([row.ids])
        logprobs = forward(ids)[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[row.prompt_length - 1 :]
        losses.append(-picked.squeeze(1))
    return torch.cat(losses).mean()


def meta_gradient(learner, one_task, episodes: list[Episode], measure_gain: bool = False):
    """What fomaml.py does with a meta-batch, for one of its ways to take a task's part of the
    gradient: [T, 3] support and query loss and the query loss before; the gradient is in
    learner.meta_gradient."""
    learner.keep()
    torch._foreach_zero_(learner.meta_gradient)
    losses = torch.zeros(len(episodes), 3)
    for row, episode in zip(losses, episodes, strict=True):
        if measure_gain:
            row[2] = learner.loss(episode.query)
        row[0], row[1] = one_task(episode)
    return losses


def random_rows(
    count: int, seed: int = 0, vocab: int = 64, demonstration: bool = False
) -> list[Row]:
    """Rows with random tokens, lengths, advantages; old log-probabilities near those of a uniform
    policy."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        ids = [rng.randrange(vocab) for _ in range(rng.randint(2, 20))]
        old = [0.0] * len(ids)
        if not demonstration:
            old = [-math.log(vocab) + rng.uniform(-0.5, 0.5) for _ in ids]
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(2, 9))]
        finished, won = rng.random() < 0.8, rng.random() < 0.5
        turn = Turn(prompt, ids, old, finished, "", float(won))
        advantages = [rng.uniform(-1, 1)] * len(ids)
        targets = [rng.uniform(0, 1) for _ in ids]
        rows.append(
            Row(turn, advantages, demonstration=demonstration, right=won, value_targets=targets)
        )
    return rows


def controller_of(**settings) -> amft.Controller:
    """With an entropy target of 0.5."""
    controller = amft.Controller(amft.Args(**{"mu_update": "normalised"} | settings))
    controller.state["entropy_target"] = 0.5
    return controller


# --------------------------------------------------------------------------------------------------
# Runs

# amft.py on a few short responses: 14 steps, a meta-gradient at each after the warm-up
AMFT_RUN = [
    "--model", "tiny_bare", "--steps", "14", "--save-every", "4", "--eval-every", "7",
    "--eval-problems", "6", "--prompts-per-step", "4", "--samples", "4", "--max-new-tokens", "24",
    "--validation-prompts", "4", "--validation-size", "8", "--mu-every", "1",
    "--warmup-steps", "2", "--show", "1", "--micro-batch", "8",
]  # fmt: skip


# Of fomaml.py or meta_lora.py: four steps of two tasks
META_RUN = [
    "--steps", "4", "--save-every", "9", "--inner-steps", "2",
    "--tasks-per-step", "2", "--support-batch", "2", "--query-batch", "3", "--shots", "0",
    "--eval-problems", "2", "--eval-tasks", "2", "--eval-max-new-tokens", "2",
]  # fmt: skip


class OneRank:
    """A world whose sums are its own numbers."""

    rank, size, shards, device = 0, 1, 1, torch.device("cpu")

    def sum(self, *values) -> list:
        return list(values)


class Parity:
    """A game of one turn that a random model wins half the time: an even number of characters."""

    def __init__(self, name: str = ""):
        self.name = name

    def reset(self, seed: int) -> int:
        return seed

    def prompt(self, state: int) -> list[dict]:
        return [{"role": "user", "content": f"What is {state} and {state}?"}]

    def step(self, state: int, text: str) -> Result:
        won = len(text) % 2 == 0
        return Result(float(won), True, won, "")

    def expert(self, state: int) -> str:
        return f"It is \\boxed{{{2 * state}}}."


def one_rank_mesh():
    return dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard"))


def command(*args, ranks: int = 0) -> list[str]:
    """python, or torchrun with that many ranks, with arguments."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, *map(str, args)]


def run(*args, ranks: int = 0) -> subprocess.CompletedProcess:
    """The finished process."""
    return subprocess.run(
        command(*args, ranks=ranks), cwd=ROOT, capture_output=True, text=True, timeout=400
    )


def run_well(*args, ranks: int = 0) -> subprocess.CompletedProcess:
    """The finished process, which must have ended with status 0."""
    done = run(*args, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_here(script, *args) -> int:
    """The exit status of a script's command line, run in this process: imports take seconds."""
    numbers = (signal.SIGINT, signal.SIGTERM)  # which a run takes for itself
    handlers = [signal.getsignal(number) for number in numbers]
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, args)]
    try:
        return script.cli()
    finally:
        sys.argv = argv
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def lines_of(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def wait_for_lines(file: Path, count: int, process: subprocess.Popen, seconds: float) -> None:
    """Until the file has that many lines, or the process has ended, or the time is over."""
    deadline = time.time() + seconds
    while time.time() < deadline and process.poll() is None and lines_of(file) < count:
        time.sleep(0.01)


def logged(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run's file without what depends on the machine: times and memory."""
    noise = ("seconds", "tokens_per_second", "peak_memory_gb")
    rows = []
    for line in (folder / name).read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if k.split("/")[0] not in noise})
    return rows


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run's checkpoint: model.safetensors, or adapter_model.safetensors."""
    from safetensors.torch import load_file

    (file,) = (folder / "checkpoint").glob("*model.safetensors")
    return load_file(file)

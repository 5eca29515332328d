"""Side by side with what people would use instead, and with the floor: ratios to be repeated.

    pip install -r bench-requirements.txt    # the peers; what is not installed is left out
    python bench.py                          # everything but scaling and decode
    python bench.py fomaml rollout --model DIR --repeats 9
    python bench.py checker --cases FILE     # rows {"response", "gold"}
    python bench.py scaling                  # over T, K, length, size; a figure; large models
    python bench.py decode --model DIR       # our sampler, generate and vLLM at batch 1, 8, 32

Ours and the peer are two processes, each warmed up, that take turns one step at a time, so that
both see the same neighbours on a shared machine. Memory is a process's peak over what it held with
model and libraries loaded (resident size on a CPU, the allocator's on a GPU).
"""

import contextlib
import copy
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro

import policy
from data import Encoded, Episode, Example, check_numbers, collate
from learner import PolicyLearner, trained_weights
from model import World, gathered, load_config, load_weights, set_gradients, token_loss
from sources import read_rows

HERE = Path(__file__).resolve().parent
BENCHES = (
    "fomaml", "meta_lora", "rollout", "amft", "checker", "startup",
    "scaling", "decode", "amft_lora",
)  # fmt: skip


@dataclass
class Args:
    """Time ours beside its peers."""

    names: tyro.conf.Positional[tuple[Literal[BENCHES], ...]] = BENCHES[:-3]
    """What to time."""
    model: str = "tiny"
    """tiny, a folder, or a hub name."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    repeats: int = 7
    """Pairs after the warm-up."""
    warmup: int = 2
    """Pairs before."""
    cases: str | None = None
    """checker: rows {"response", "gold"} (.jsonl)."""
    figure: str = "scaling.png"
    """scaling: where its picture goes."""
    json: str | None = None
    """Write the rows of the pairs here as well."""
    worker: str | None = None
    """(For the child processes.)"""


# Where the numbers must lie
NUMBERS = {"[1, 1e6]": ("repeats",), "[0, 1e6]": ("warmup",)}


class Pair(NamedTuple):
    """ours and peer are functions of this file, with their numbers after colons."""

    label: str
    ours: str
    peer: str
    package: str | None  # the peer's
    target: float  # of the peer's time / ours


PAIRS = {
    "fomaml": [
        Pair(
            "FOMAML meta-step, T=4, K=5, 4 x 96 tokens, against TorchOpt MetaSGD",
            "fomaml_ours",
            "fomaml_torchopt",
            "torchopt",
            2.5,
        ),
        Pair("the same, against a deep copy a task", "fomaml_ours", "fomaml_deepcopy", None, 1.0),
        Pair(
            "the same, against its bare forward and backward passes (floor)",
            "fomaml_ours",
            "fomaml_floor",
            None,
            1 / 1.05,
        ),
    ],
    "meta_lora": [
        Pair(
            "MeTA-LoRA round, T=4, K=10, 4 x 96 tokens a task, against PEFT task after task",
            "lora_ours:4:96",
            "lora_peft:4:96",
            "peft",
            1.2,
        ),
        Pair("the same, 1 x 32 tokens a task", "lora_ours:1:32", "lora_peft:1:32", "peft", 2.0),
    ],
    "rollout": [
        Pair(
            "8 prompts x 8 samples, 64 + up to 128 tokens, against transformers generate",
            "rollout_ours",
            "rollout_generate",
            None,
            6.0,
        ),
    ],
    "amft": [
        Pair(
            "GRPO step, 8 x 8 x (40 + 64) tokens, against TRL GRPOTrainer",
            "grpo_ours:8:8:0",
            "grpo_trl:8:8:0",
            "trl",
            4.0,
        ),
    ],
    "amft_lora": [
        Pair(
            "GRPO step with LoRA, r=16, 4 x 4 x (40 + 64) tokens, against TRL with PEFT",
            "grpo_ours:4:4:16",
            "grpo_trl:4:4:16",
            "trl",
            1.0,
        ),
    ],
}


# --------------------------------------------------------------------------------------------------
# The work of each pair. A side gets the model's name and device, prepares everything and returns a
# function that does one unit of work. The scripts and the peers are imported where they are used.


def loaded(name: str, device: str):
    return load_weights(name).to(torch.device(device)).train()


T, K, ROWS, LENGTH, INNER_LR = 4, 5, 4, 96, 1e-2


def random_episodes(count: int, steps: int, rows: int, length: int) -> tuple[list[Episode], dict]:
    """(episodes, {example.id: Encoded}) of random tokens, half prompt, half response."""
    rng, tokens, episodes = random.Random(0), {}, []
    for t in range(count):
        examples = []
        for i in range((steps + 1) * rows):
            example = Example("", "", "", "", 0, f"{t}/{i}")
            ids = [rng.randrange(20, 400) for _ in range(length)]
            tokens[example.id] = Encoded(ids, length // 2)
            examples.append(example)
        episodes.append(Episode(str(t), examples[: steps * rows], examples[steps * rows :]))
    return episodes, tokens


def batches_of(episode: Episode, tokens: dict, device: str, rows: int) -> list[dict]:
    """An episode's support batches, and its query batch."""
    starts = range(0, len(episode.support), rows)
    batches = []
    for examples in [*(episode.support[i : i + rows] for i in starts), episode.query]:
        batch = collate([tokens[e.id] for e in examples], 0)
        batches.append({name: x.to(torch.device(device)) for name, x in batch.items()})
    return batches


def mean_loss(model, batch: dict) -> torch.Tensor:
    return token_loss(model, batch) / (batch["labels"] != -100).sum()


def fomaml_ours(
    name: str, device: str, tasks: int = T, steps: int = K, rows: int = ROWS, length: int = LENGTH
) -> Callable[[], None]:
    import fomaml

    args = fomaml.Args(
        inner_optimizer="sgd",
        inner_lr=INNER_LR,
        inner_steps=steps,
        support_batch=rows,
        query_batch=rows,
        tasks_per_step=tasks,
    )
    episodes, tokens = random_episodes(tasks, steps, rows, length)
    world = World(torch.device(device))
    learner = fomaml.MetaLearner(loaded(name, device), args, world, 0, tokens)
    optimizer = torch.optim.AdamW(learner.params, lr=1e-5, fused=True)

    def step() -> None:
        learner.keep()
        torch._foreach_zero_(learner.meta_gradient)
        for episode in episodes:
            learner.fomaml(episode)
        set_gradients(learner.params, learner.meta_gradient)
        torch.nn.utils.clip_grad_norm_(learner.params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fomaml_floor(name: str, device: str) -> Callable[[], None]:
    """The bare forward and backward passes of a meta-step."""
    model = loaded(name, device)
    episodes, tokens = random_episodes(T, K, ROWS, LENGTH)

    def step() -> None:
        for episode in episodes:
            for batch in batches_of(episode, tokens, device, ROWS):
                mean_loss(model, batch).backward()
                model.zero_grad()

    return step


def fomaml_deepcopy(name: str, device: str) -> Callable[[], None]:
    """A copy of the model for each task, as the public trainer does."""
    model = loaded(name, device)
    episodes, tokens = random_episodes(T, K, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        for episode in episodes:
            fast = copy.deepcopy(model)
            inner = torch.optim.SGD(fast.parameters(), lr=INNER_LR)
            *support, query = batches_of(episode, tokens, device, ROWS)
            for batch in support:
                inner.zero_grad()
                mean_loss(fast, batch).backward()
                inner.step()
            inner.zero_grad()
            (mean_loss(fast, query) / T).backward()
            with torch.no_grad():
                for p, q in zip(model.parameters(), fast.parameters(), strict=True):
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
            del fast, inner
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fomaml_torchopt(name: str, device: str) -> Callable[[], None]:
    """TorchOpt's MetaSGD, which keeps the graph of the inner loop (second order)."""
    import torchopt

    model = loaded(name, device)
    model.config._attn_implementation = "eager"  # it has second derivatives
    episodes, tokens = random_episodes(T, K, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inner = torchopt.MetaSGD(model, lr=INNER_LR)

    def step() -> None:
        weights = torchopt.extract_state_dict(model, by="reference")
        state = torchopt.extract_state_dict(inner, by="reference")
        for episode in episodes:
            *support, query = batches_of(episode, tokens, device, ROWS)
            for batch in support:
                inner.step(mean_loss(model, batch))
            (mean_loss(model, query) / T).backward()
            torchopt.recover_state_dict(model, weights)
            torchopt.recover_state_dict(inner, state)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora_ours(name: str, device: str, rows: int, length: int) -> Callable[[], None]:
    import meta_lora

    args = meta_lora.Args(
        inner_optimizer="adam",
        inner_lr=1e-3,
        inner_steps=10,
        dropout=0.05,
        support_batch=rows,
        query_batch=rows,
        tasks_per_step=4,
    )
    episodes, tokens = random_episodes(4, 10, rows, length)
    world, base = World(torch.device(device)), loaded(name, device).requires_grad_(False)
    adapters = meta_lora.add_adapters(args, base, world)
    learner = meta_lora.AdapterLearner(base, adapters, args, world, 0, tokens)

    def step() -> None:
        torch._foreach_zero_(learner.meta_gradient)
        with adapters.with_dropout():
            learner.fomaml(episodes)

    return step


def lora_peft(name: str, device: str, rows: int, length: int) -> Callable[[], None]:
    """PEFT, one task after the other."""
    import peft

    import meta_lora

    args = meta_lora.Args(dropout=0.05)
    config = peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=list(args.target_modules),
    )
    model = peft.get_peft_model(loaded(name, device), config).train()
    params = [p for p in model.parameters() if p.requires_grad]
    phi = [p.detach().clone() for p in params]
    episodes, tokens = random_episodes(4, 10, rows, length)

    def step() -> None:
        meta_gradient = [torch.zeros_like(p) for p in params]
        for episode in episodes:
            with torch.no_grad():
                for p, q in zip(params, phi, strict=True):
                    p.copy_(q)
            optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
            *support, query = batches_of(episode, tokens, device, rows)
            for batch in support:
                mean_loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            mean_loss(model, query).backward()
            for g, p in zip(meta_gradient, params, strict=True):
                g.add_(p.grad, alpha=1 / len(episodes))
            optimizer.zero_grad()

    return step


def random_prompts(tokenizer, count: int, length: int) -> list[list[int]]:
    rng, prompts = random.Random(0), []
    for _ in range(count):
        prompts.append([rng.randrange(20, min(400, len(tokenizer))) for _ in range(length)])
    return prompts


def response_lengths(count: int, longest: int) -> torch.Tensor:
    rng = random.Random(1)
    return torch.tensor([rng.randint(8, longest) for _ in range(count)])


def rollout_ours(name: str, device: str) -> Callable[[], None]:
    """8 prompts of 64 tokens x 8 samples, up to 128 new tokens, ended at random lengths.

    The lengths are the same for both sides.
    """
    _, tokenizer = load_config(name)
    model, end = loaded(name, device).eval(), tokenizer.eos_token_id
    prompts, lengths = random_prompts(tokenizer, 8, 64), response_lengths(64, 128)
    draw = policy._draw
    drawn, rows = 0, torch.arange(64)  # tokens drawn so far; the rows that are not over

    def draw_to_length(logits, u, temperature, top_p):
        """As the sampler draws, with the end token at each row's length and nowhere else."""
        nonlocal drawn, rows
        token, logprob = draw(logits, u, temperature, top_p)
        token[token == end] += 1
        drawn += 1
        over = lengths[rows] <= drawn
        token[over.to(token.device)] = end
        rows = rows[policy._without_ended(over)]
        return token, logprob

    policy._draw = draw_to_length

    def step() -> None:
        nonlocal drawn, rows
        drawn, rows = 0, torch.arange(64)
        generator = torch.Generator().manual_seed(0)
        samples = policy.sample(
            model, tokenizer, prompts, 8, 128, generator=generator, stop=frozenset([end])
        )
        assert sorted(len(s.ids) for s in samples) == sorted(lengths.tolist())

    return step


def rollout_generate(name: str, device: str) -> Callable[[], None]:
    """transformers' generate with the same prompts and lengths."""
    from transformers import LogitsProcessor, LogitsProcessorList

    _, tokenizer = load_config(name)
    model, end = loaded(name, device).eval(), tokenizer.eos_token_id
    prompts, lengths = random_prompts(tokenizer, 8, 64), response_lengths(64, 128)

    class EndAtLength(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, end] = -math.inf
            over = (lengths <= ids.shape[1] - 64 + 1).to(scores.device)
            scores[over] = -math.inf
            scores[over, end] = 0.0
            return scores

    ids = torch.tensor(prompts, device=torch.device(device)).repeat_interleave(8, 0)

    def step() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=128,
                min_new_tokens=0,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([EndAtLength()]),
            )

    return step


DECODED = (1, 8, 32)  # sequences at once


def decode_step(name: str, count: int, decode: Callable[[list], object]) -> Callable[[], None]:
    """`count` prompts of 64 tokens, others at every step, for `decode`, which is warmed up."""
    _, tokenizer = load_config(name)
    rng = random.Random(0)
    decode([[20]])

    def step() -> None:
        prompts = []
        for _ in range(count):
            prompts.append([rng.randrange(20, min(400, len(tokenizer))) for _ in range(64)])
        decode(prompts)

    return step


def decode_ours(name: str, device: str, count: int) -> Callable[[], None]:
    """64 new tokens for each prompt; nothing ends a response."""
    _, tokenizer = load_config(name)
    model = loaded(name, device).eval()
    how = {"max_new_tokens": 64, "stop": frozenset([-1])}
    return decode_step(name, count, partial(policy.sample, model, tokenizer, **how))


def decode_generate(name: str, device: str, count: int) -> Callable[[], None]:
    model = loaded(name, device).eval()
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def decode(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts, device=torch.device(device))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, min_new_tokens=64, max_new_tokens=64, **how)

    return decode_step(name, count, decode)


def decode_vllm(name: str, device: str, count: int) -> Callable[[], None]:
    """vLLM as --sampler vllm runs it: eager on a CPU, compiled with CUDA graphs on a GPU."""
    from vllm_sampler import VllmSampler

    config, tokenizer = load_config(name)
    model = loaded(name, device).eval()
    engine = VllmSampler(
        name,
        config,
        dtype=torch.float32,
        sequences=count,
        longest=128,
        max_length=128,
        eager=device == "cpu",
    )
    how = {"max_new_tokens": 64, "stop": frozenset([-1])}
    return decode_step(name, count, partial(engine.sample, model, tokenizer, **how))


PROMPT_LENGTH, NEW_TOKENS = 40, 64  # of a GRPO step


def grpo_ours(name: str, device: str, count: int, n: int, r: int) -> Callable[[], None]:
    """`count` prompts of 40 tokens x n samples of exactly 64 tokens, random rewards: rollout, loss,
    AdamW step on all weights (r = 0) or on adapters of rank r."""
    import amft
    from games.play import Trajectory, Turn

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _, tokenizer = load_config(name)
    args = amft.with_defaults(
        amft.Args(
            method="rl",
            samples=n,
            prompts_per_step=count,
            max_new_tokens=NEW_TOKENS,
            lora_r=r,
        )
    )
    lm = policy.Policy(loaded(name, device), value_head=False).train()
    if r:
        lm.requires_grad_(False)
        amft.add_adapters(args, lm, torch.device(device))
    weights = {"params": [p for _, p in trained_weights(lm)], "lr": 1e-6, "peak": 1e-6}
    optimizer = torch.optim.AdamW([weights], fused=True)
    world = World(torch.device(device))
    learner = PolicyLearner(args, lm, optimizer, world, tokenizer.pad_token_id)
    prompts, rng = random_prompts(tokenizer, count, PROMPT_LENGTH), random.Random(0)

    def rollout() -> list[list[Trajectory]]:
        generator = torch.Generator().manual_seed(0)
        with gathered(lm):
            samples = policy.sample(
                lm.lm,
                tokenizer,
                prompts,
                n,
                NEW_TOKENS,
                generator=generator,
                stop=frozenset([-1]),
            )
        trajectories = []
        for i, s in enumerate(samples):
            reward = float(rng.random() < 0.5)
            turn = Turn(prompts[i // n], s.ids, s.logprobs, True, "", reward)
            trajectories.append(Trajectory([turn]))
        return [trajectories[i : i + n] for i in range(0, len(samples), n)]

    def step() -> None:
        groups = rollout()
        _, rl = amft.rows_of(args, groups, [group[0] for group in groups])
        amft.train_on(learner, 0.0, [], rl, schedule=1.0, with_D=False)

    return step


def grpo_trl(name: str, device: str, count: int, n: int, r: int) -> Callable[[], None]:
    """TRL's GRPOTrainer with the same prompts, lengths and rewards (r: with PEFT's adapters).

    It runs in a thread, and a callback lets one step through at a time.
    """
    import datasets
    import transformers
    import trl

    _, tokenizer = load_config(name)
    tokenizer.padding_side = "left"
    prompts = random_prompts(tokenizer, count, PROMPT_LENGTH)
    rows = datasets.Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in prompts]})
    rng, go, done = random.Random(0), threading.Semaphore(0), threading.Semaphore(0)

    class OneAtATime(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.acquire()

        def on_step_end(self, *args, **kwargs):
            done.release()

    def random_rewards(completions, **columns):
        return [float(rng.random() < 0.5) for _ in completions]

    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=count * n,
        num_generations=n,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        max_steps=10**6,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    adapters = None
    if r:
        import peft

        import amft

        args = amft.Args(lora_r=r)
        targets = list(args.target_modules)
        adapters = peft.LoraConfig(r=r, lora_alpha=args.lora_alpha, target_modules=targets)
    trainer = trl.GRPOTrainer(
        model=loaded(name, device),
        reward_funcs=random_rewards,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[OneAtATime()],
        peft_config=adapters,
    )
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    return step


# --------------------------------------------------------------------------------------------------
# Two processes that take turns


def work(side: str, model: str, device: str) -> None:
    """The child: for each line on standard input one unit of work, its seconds printed; at the end
    the peak memory in bytes. It ends the process."""
    name, *numbers = side.split(":")
    step = globals()[name](model, device, *map(int, numbers))
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        print(f"\n@{time.perf_counter() - start}", flush=True)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    print(f"\n@{peak - before}", flush=True)
    os._exit(0)  # a peer's trainer may still wait in its thread


def resident(key: str) -> int:
    """Bytes, of /proc/self/status (0 where there is none: on a Mac memory is not measured)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


class Worker:
    """The parent's side of a child."""

    def __init__(self, side: str, args: Args):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is read when the child fails
        command = [sys.executable, __file__, "--worker", side]
        self.process = subprocess.Popen(
            [*command, "--model", args.model, "--device", args.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=HERE,
        )
        self._read("ready")

    def _read(self, start: str) -> str:
        for line in self.process.stdout:
            if line.startswith(start):
                return line[len(start) :]
        self.log.seek(0)
        raise RuntimeError((self.log.read().strip().splitlines() or ["ended"])[-1])

    def go(self) -> float:
        """The seconds of one unit of work."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._read("@"))

    def finish(self) -> float:
        """Its peak memory in bytes."""
        self.process.stdin.close()
        peak = float(self._read("@"))
        self.process.wait()
        return peak


def version(package: str) -> str | None:
    """None for a package that is not installed. vLLM's build for a CPU has a name of its own."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return None


def compare(pair: Pair, args: Args) -> dict:
    """Medians, the ratio peer / ours of neighbouring steps with its range, peak memory."""
    found = version(pair.package) if pair.package else ""
    if found is None:
        return {"work": pair.label, "missing": f"not installed: pip install {pair.package}"}
    ours, peer = Worker(pair.ours, args), Worker(pair.peer, args)
    seconds = [(ours.go(), peer.go()) for _ in range(args.warmup + args.repeats)][args.warmup :]
    ratios = sorted(b / a for a, b in seconds)
    return {
        "work": pair.label,
        "peer": found,
        "ours_seconds": statistics.median(a for a, _ in seconds),
        "peer_seconds": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "ours_bytes": ours.finish(),
        "peer_bytes": peer.finish(),
        "target": pair.target,
    }


def table_row(r: dict) -> str:
    if "missing" in r:
        return f"| {r['work']} | | | {r['missing']} | | |"
    label = f"{r['work']} ({r['peer']})" if r["peer"] else r["work"]
    ours, peer = r["ours_bytes"], r["peer_bytes"]
    memory = f"{ours / 1e6:.0f}, {peer / 1e6:.0f} MB ({peer / ours:.1f})" if ours > 0 else "-"
    return (
        f"| {label} | {r['ours_seconds']:.3g} s | {r['peer_seconds']:.3g} s "
        f"| **{r['ratio']:.2f}** ({r['low']:.2f} to {r['high']:.2f}) "
        f"| {r['target']:.2f} | {memory} |"
    )


# --------------------------------------------------------------------------------------------------
# What is not a pair of steps


def timed(f: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def run_script(script: str, *flags: str, ranks: int = 0, **options) -> list[dict]:
    """The metrics of a run of a script, by torchrun where ranks is not 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(launcher if ranks else ()), script, *flags]
        command += ["--output-dir", f"{folder}/run"]
        subprocess.run(command, cwd=HERE, check=True, capture_output=True, **options)
        lines = Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def bench_controller(args: Args) -> list[str]:
    """AMFT's controller: (19 plain steps + 1 update step) / 20 plain steps, all of one run, with
    K = 20 steps between updates."""
    steps = str(20 * args.repeats + 1)
    rows = run_script(
        "amft.py", "--model", "tiny_bare", "--steps", steps, "--save-every", steps,
        "--mu-every", "20", "--warmup-steps", "1", "--eval-every", "-1", "--show", "0",
    )  # fmt: skip
    ratios = []
    for i, row in enumerate(rows):
        if "grad_mu" in row:
            near = [r["seconds"] for r in rows[max(2, i - 10) : i + 10] if "grad_mu" not in r]
            plain = statistics.mean(near)
            ratios.append((19 * plain + row["seconds"]) / (20 * plain))
    return [
        "| AMFT's controller at K = 20: step with it / step without (tiny_bare, 16 x 8 samples) | "
        f"| | **{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f}) "
        "| 1.10 | |"
    ]


def bench_decode(args: Args) -> list[str]:
    """Tokens/s of new ones: our sampler, the library's generate and vLLM, who take turns."""
    sides = ["ours", "generate"]
    vllm = version("vllm") or "vllm: not installed"
    if version("vllm"):
        sides.append("vllm")
    lines = [
        "",
        f"| sequences of 64 + 64 tokens, fp32 | ours | generate | {vllm} |",
        "|---|---|---|---|",
    ]
    for count in DECODED:
        workers = [Worker(f"decode_{side}:{count}", args) for side in sides]
        seconds = []
        for _ in range(args.warmup + args.repeats):
            seconds.append([worker.go() for worker in workers])
        for worker in workers:
            worker.finish()
        row = f"| {count} "
        for times in zip(*seconds[args.warmup :], strict=True):
            speeds = sorted(64 * count / t for t in times)
            row += f"| {statistics.median(speeds):.1f} ({speeds[0]:.1f} to {speeds[-1]:.1f}) "
        lines.append(row + "|")
    return lines


def bench_checker(args: Args) -> list[str]:
    """Ours and Math-Verify on the same rows, one after the other."""
    title = "checker against Math-Verify"
    if not args.cases:
        return [f'| {title} | | | give --cases FILE with rows {{"response", "gold"}} | | |']
    if (found := version("math-verify")) is None:
        return [f"| {title} | | | not installed: pip install math-verify | | |"]
    import math_verify

    import checker

    def verify(row: dict) -> None:
        with contextlib.suppress(Exception):  # it may fail on a row: the time counts all the same
            gold = math_verify.parse(f"${row['gold']}$")
            math_verify.verify(gold, math_verify.parse(row["response"]))

    rows = read_rows(Path(args.cases))
    if not rows or not {"response", "gold"} <= set.intersection(*map(set, rows)):
        raise ValueError(f'{args.cases}: not rows {{"response", "gold"}}')
    ours, theirs = [], []
    for row in rows:
        ours.append(timed(partial(checker.grade, row["response"], row["gold"])))
        theirs.append(timed(partial(verify, row)))
    lines = []
    for label, at, target in (("median", 0.5, "5"), ("99th percentile", 0.99, "20")):
        place = min(len(rows) - 1, int(at * len(rows)))
        a, b = sorted(ours)[place], sorted(theirs)[place]
        lines.append(
            f"| checker on {len(rows)} rows, {label}, against Math-Verify ({found}) "
            f"| {1e3 * a:.3g} ms | {1e3 * b:.3g} ms | **{b / a:.1f}** | {target} | |"
        )
    return lines


def bench_startup(args: Args) -> list[str]:
    """From the command to the end of the first meta-step, and where the time goes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", "1", "--eval-every", "-1", "--output-dir", f"{folder}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*torchrun, "fomaml.py", *flags],
            cwd=HERE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        written = {}  # seconds until a file has something in it
        while len(written) < 2 and process.poll() is None:
            for name in ("args.json", "metrics.jsonl"):
                file = Path(folder) / "run" / name
                if name not in written and file.exists() and file.stat().st_size:
                    written[name] = time.perf_counter() - start
            time.sleep(0.005)
        process.wait()
        step = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text())["seconds"]
    imports = fastest_of_two([sys.executable, "-c", "import fomaml"])
    launcher = fastest_of_two([*torchrun, "--no-python", "true"])
    prepared, stepped = written["args.json"], written["metrics.jsonl"]
    data = max(0.0, prepared - launcher - imports)
    weights = max(0.0, stepped - prepared - step)
    return [
        f"| torchrun fomaml.py to the end of its first meta-step | {stepped:.1f} s | | | | |",
        f"| of that: torchrun itself {launcher:.1f}, imports {imports:.1f}, problems and tokens "
        f"{data:.1f}, weights {weights:.1f}, the step {step:.1f} s | | | | | |",
    ]


def fastest_of_two(command: list[str]) -> float:
    def run() -> None:
        subprocess.run(command, cwd=HERE, check=True, capture_output=True)

    return min(timed(run), timed(run))


# --------------------------------------------------------------------------------------------------
# Scaling


class Point(NamedTuple):
    """A meta-step of a size, timed."""

    x: float
    seconds: float
    peak_bytes: float


def bench_scaling(args: Args) -> list[str]:
    """Time and memory of a meta-step over T, K, sequence length and model size, 1 against 2 ranks;
    and large models on paper."""
    lines, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in meta_step_sizes(args.model, folder).items():
            found[name] = [time_meta_step(args, x, *size) for x, *size in sizes]
            lines.append(scaling_row(name, found[name]))
    draw_scaling(found, args.figure)
    return [*lines, *bench_ranks(args), *on_paper()]


def meta_step_sizes(model: str, folder: str) -> dict[str, list[tuple]]:
    """{what grows: [(its value, model, T, K, tokens a row)]}."""
    by_size = []
    for width in (64, 128, 256, 512):
        path = f"{folder}/{width}"
        by_size.append((random_llama(width, path) / 1e6, path, 2, 2, 96))
    return {
        "T (K = 5)": [(t, model, t, 5, 96) for t in (1, 2, 4, 8)],
        "K + 1 (T = 2)": [(k + 1, model, 2, k, 96) for k in (1, 3, 7, 15)],
        "tokens a row (T = 2, K = 2)": [(n, model, 2, 2, n) for n in (32, 64, 128, 256)],
        "million parameters (T = 2, K = 2)": by_size,
    }


def random_llama(width: int, folder: str) -> int:
    """A random Llama of four layers in a folder, as wide as asked; the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=653,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def time_meta_step(args: Args, x: float, model: str, tasks: int, steps: int, length: int) -> Point:
    worker = Worker(f"fomaml_ours:{tasks}:{steps}:{ROWS}:{length}", replace(args, model=model))
    worker.go()
    seconds = statistics.median(worker.go() for _ in range(max(3, args.repeats // 2)))
    return Point(x, seconds, worker.finish())


def scaling_row(name: str, points: list[Point]) -> str:
    """With the exponent of the time: the slope of a line through the logarithms."""
    xs, ys = [math.log(p.x) for p in points], [math.log(p.seconds) for p in points]
    slope = statistics.linear_regression(xs, ys).slope
    first, last = points[0], points[-1]
    return (
        f"| meta-step time over {name}, {first.x:.3g} to {last.x:.3g} "
        f"| {first.seconds:.2f} to {last.seconds:.2f} s | | exponent {slope:.2f} "
        f"| | {first.peak_bytes / 1e6:.0f} to {last.peak_bytes / 1e6:.0f} MB |"
    )


def draw_scaling(found: dict[str, list[Point]], out: str) -> None:
    import matplotlib.pyplot as plt

    import plots

    with plt.rc_context(plots.STYLE):
        fig, axes = plt.subplots(2, 2, figsize=(7.4, 6))
        for axis, (name, points) in zip(axes.flat, found.items(), strict=True):
            xs, seconds = [p.x for p in points], [p.seconds for p in points]
            gigabytes = [p.peak_bytes / 1e9 for p in points]
            linear = [seconds[0], seconds[0] * xs[-1] / xs[0]]
            time_colour, memory_colour, *_ = plots.COLOURS
            axis.loglog(xs, seconds, "-o", color=time_colour, label="seconds a meta-step")
            axis.loglog(xs, gigabytes, "--s", color=memory_colour, label="peak memory (GB)")
            axis.loglog([xs[0], xs[-1]], linear, ":", color=plots.GREY, linewidth=1, label="linear")
            axis.set(xlabel=name)
            axis.set_xticks(xs, [f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in xs])
            axis.minorticks_off()
            axis.legend()
        fig.savefig(out)
        plt.close(fig)


def bench_ranks(args: Args) -> list[str]:
    lines = []
    for label, ranks, flags in (
        ("one rank", 1, ()),
        ("two ranks that share the shards", 2, ()),
        ("two replicas", 2, ("--replicas", "2")),
    ):
        rows = run_script(
            "fomaml.py", "--model", args.model, "--data", "embedded", "--inner-optimizer", "sgd",
            "--inner-lr", "0.1", "--inner-steps", "10", "--shots", "0", "--support-batch", "4",
            "--query-batch", "8", "--steps", "8", "--save-every", "8", "--eval-every", "-1",
            "--gain-every", "0", *flags,
            ranks=ranks,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seconds = statistics.median(row["seconds"] for row in rows[2:])
        lines.append(
            f"| fomaml.py, meta-step on embedded families, {label}, one thread each "
            f"| {seconds:.2f} s | | | "
            f"| {rows[-1]['peak_memory_gb']:.2f} GB a rank, libraries included |"
        )
    return lines


class Size(NamedTuple):
    """A model on paper."""

    name: str
    parameters: float
    layers: int
    hidden: int
    vocabulary: int


def on_paper() -> list[str]:
    """FOMAML on H100s, from bytes and FLOPs.

    Assumptions: fp32 master weights, copy, accumulator and Adam's two, 20 bytes a parameter over
    the shards; bf16 compute at 40% of 989 TFLOP/s; 6 FLOPs a parameter and token, 8 with recomputed
    activations; one layer's weights and gradient unsharded at a time; activations of one row of
    2,048 tokens a rank, recomputed; reference setting T = 4, K = 5, 4 x 2,048 tokens. All-gather
    and reduce-scatter move 2 + 2 + 4 bytes a parameter and pass at 300 GB/s (NVLink, one node of 8)
    or 40 GB/s (64 GPUs), not overlapped.
    """
    lines = [
        "",
        "Large models on paper, FOMAML, reference setting (T = 4, K = 5, 4 x 2,048 tokens a "
        "batch), H100, recomputed activations:",
        "",
        "| model | GPUs (replicas x shards) | memory a GPU | compute a step "
        "| communication a step, not overlapped |",
        "|---|---|---|---|---|",
    ]
    small = Size("4B (36 layers, 2560)", 4.0e9, 36, 2560, 151_936)
    large = Size("7B (28 layers, 3584)", 7.6e9, 28, 3584, 152_064)
    for m in (small, large):
        for gpus, replicas in ((4, 1), (8, 2), (64, 4)):
            shards, tokens = gpus // replicas, 2048  # each rank has a row of every batch
            held = 20 * m.parameters / shards + 2 * 6 * m.parameters / m.layers
            activations = tokens * m.hidden * m.layers * 4 + tokens * m.vocabulary * 8
            passes = 4 / replicas * 6
            compute = passes * 8 * m.parameters * tokens / (0.4 * 989e12)
            bandwidth = 300e9 if gpus <= 8 else 40e9
            moved = passes * 8 * m.parameters * (shards - 1) / shards
            note = "" if shards <= 4 else ", batches of 16 rows: four times the tokens"
            lines.append(
                f"| {m.name} | {gpus} ({replicas} x {shards}){note} "
                f"| {(held + activations) / 1e9:.0f} GB | {compute:.1f} s "
                f"| {moved / bandwidth:.1f} s |"
            )
    return lines


# --------------------------------------------------------------------------------------------------


NOT_PAIRS = {
    "amft": bench_controller,
    "checker": bench_checker,
    "startup": bench_startup,
    "scaling": bench_scaling,
    "decode": bench_decode,
}
HEAD = (
    "| work | ours | peer | peer / ours (range) | target "
    "| memory over the loaded model: ours, peer (ratio) |\n|---|---|---|---|---|---|"
)


def main(args: Args) -> int:
    if args.worker:
        work(args.worker, args.model, args.device)
    check_numbers(args, NUMBERS)
    load_config(args.model)  # a wrong name is said before anything is timed
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.py: --device cuda, but there is no GPU", file=sys.stderr)
        return 2
    machine = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s)"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(
        f"{machine}, python {platform.python_version()}, torch {torch.__version__}, "
        f"model {args.model}, {time.strftime('%Y-%m-%d')}\n\n{HEAD}",
        flush=True,
    )
    results, failed = [], 0
    for name in args.names:
        for pair in PAIRS.get(name, ()):
            try:
                results.append(compare(pair, args))
                print(table_row(results[-1]), flush=True)
            except RuntimeError as e:
                failed = 1
                print(f"| {pair.label} | | | failed: {e} | | |", flush=True)
        if name in NOT_PAIRS:
            print("\n".join(NOT_PAIRS[name](args)), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (ValueError, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)

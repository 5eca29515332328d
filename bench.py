"""Side by side with what people would use instead, and with the floor: ratios that anyone can repeat.

    python bench.py                          # everything that is installed (pip install -r bench-requirements.txt for the peers)
    python bench.py fomaml rollout --model DIR --repeats 9
    python bench.py checker --cases FILE     # rows {"response", "gold"}
    python bench.py scaling                  # time and memory over T, K, length, size; a figure; estimates for large models

Ours and the peer are two processes, each warmed up, that take turns one step at a time, so that both see the same neighbours on a shared
machine. Memory is a process's peak over what it held with model and libraries loaded (resident size on a CPU, the allocator's on a GPU).
"""

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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# The work of each pair. A side gets the model's name and device, prepares everything and returns a function that does one unit of work.


def _device(name: str):
    import torch

    return torch.device(name)


def _loaded(name: str, device: str, **options):
    import model as models

    model = models.load_weights(name).to(_device(device)).train()
    for k, v in options.items():
        setattr(model.config, k, v)
    return model


def _episodes(count: int, steps: int, rows: int, length: int):
    """(episodes, tokens) of random tokens, half prompt, half response."""
    from data import Encoded, Episode, Example

    rng, tokens, episodes = random.Random(0), {}, []
    for t in range(count):
        examples = [Example("", "", "", "", 0, f"{t}/{i}") for i in range((steps + 1) * rows)]
        tokens |= {e.id: Encoded([rng.randrange(20, 400) for _ in range(length)], length // 2) for e in examples}
        episodes.append(Episode(str(t), examples[: steps * rows], examples[steps * rows :]))
    return episodes, tokens


T, K, ROWS, LENGTH, INNER_LR = 4, 5, 4, 96, 1e-2


def _batches(episode, tokens, device: str, rows: int) -> list[dict]:
    from data import collate

    parts = [episode.support[i : i + rows] for i in range(0, len(episode.support), rows)] + [episode.query]
    return [{k: v.to(_device(device)) for k, v in collate([tokens[e.id] for e in part], 0).items()} for part in parts]


def _mean_loss(model, batch):
    import model as models

    return models.token_loss(model, batch) / (batch["labels"] != -100).sum()


def fomaml_ours(name: str, device: str, tasks: int = T, steps: int = K, rows: int = ROWS, length: int = LENGTH) -> Callable[[], None]:
    import torch

    import fomaml

    model = _loaded(name, device)
    episodes, tokens = _episodes(tasks, steps, rows, length)
    learner = fomaml.Learner(model, fomaml.Buffers(model, INNER_LR), fomaml.World(_device(device)), 0, tokens)
    optimizer = torch.optim.AdamW(learner.buffers.params, lr=1e-5, fused=True)

    def step() -> None:
        fomaml.meta_gradient(learner, episodes, "fomaml", rows, tasks)
        fomaml.set_gradients(learner.buffers)
        torch.nn.utils.clip_grad_norm_(learner.buffers.params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fomaml_floor(name: str, device: str) -> Callable[[], None]:
    """The bare forward and backward passes of a meta-step."""
    model = _loaded(name, device)
    episodes, tokens = _episodes(T, K, ROWS, LENGTH)

    def step() -> None:
        for episode in episodes:
            for batch in _batches(episode, tokens, device, ROWS):
                _mean_loss(model, batch).backward()
                model.zero_grad()

    return step


def fomaml_deepcopy(name: str, device: str) -> Callable[[], None]:
    """A copy of the model for each task, as the public trainer does."""
    import copy

    import torch

    model = _loaded(name, device)
    episodes, tokens = _episodes(T, K, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        for episode in episodes:
            fast = copy.deepcopy(model)
            inner = torch.optim.SGD(fast.parameters(), lr=INNER_LR)
            *support, query = _batches(episode, tokens, device, ROWS)
            for batch in support:
                inner.zero_grad()
                _mean_loss(fast, batch).backward()
                inner.step()
            inner.zero_grad()
            (_mean_loss(fast, query) / T).backward()
            with torch.no_grad():
                for p, q in zip(model.parameters(), fast.parameters(), strict=True):
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
            del fast, inner
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fomaml_torchopt(name: str, device: str) -> Callable[[], None]:
    """TorchOpt's MetaSGD, which keeps the graph of the inner loop (second order), with eager attention."""
    import torch
    import torchopt

    model = _loaded(name, device, _attn_implementation="eager")
    episodes, tokens = _episodes(T, K, ROWS, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inner = torchopt.MetaSGD(model, lr=INNER_LR)

    def step() -> None:
        weights, state = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(inner, by="reference")
        for episode in episodes:
            *support, query = _batches(episode, tokens, device, ROWS)
            for batch in support:
                inner.step(_mean_loss(model, batch))
            (_mean_loss(model, query) / T).backward()
            torchopt.recover_state_dict(model, weights)
            torchopt.recover_state_dict(inner, state)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora_ours(name: str, device: str, rows: int, length: int) -> Callable[[], None]:
    import fomaml
    import meta_lora

    args = meta_lora.Args(model=name, inner_optimizer="adam", inner_lr=1e-3)
    episodes, tokens = _episodes(4, 10, rows, length)
    base = _loaded(name, device).requires_grad_(False)
    learner = meta_lora.Learner(base, meta_lora.Adapters(base, args, _device(device)), args, fomaml.World(_device(device)), 0, tokens)

    def step() -> None:
        meta_lora.meta_gradient(learner, episodes, "fomaml", rows, 4)

    return step


def lora_peft(name: str, device: str, rows: int, length: int) -> Callable[[], None]:
    """PEFT, one task after the other."""
    import peft
    import torch

    import meta_lora

    args = meta_lora.Args()
    model = peft.get_peft_model(_loaded(name, device), peft.LoraConfig(r=args.r, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules=list(args.target_modules))).train()
    params = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in params]
    episodes, tokens = _episodes(4, 10, rows, length)

    def step() -> None:
        meta = [torch.zeros_like(p) for p in params]
        for episode in episodes:
            with torch.no_grad():
                for p, q in zip(params, start, strict=True):
                    p.copy_(q)
            optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
            *support, query = _batches(episode, tokens, device, rows)
            for batch in support:
                _mean_loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            _mean_loss(model, query).backward()
            for g, p in zip(meta, params, strict=True):
                g.add_(p.grad, alpha=1 / len(episodes))
            optimizer.zero_grad()

    return step


def _prompts(tokenizer, count: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(20, min(400, len(tokenizer))) for _ in range(length)] for _ in range(count)]


def _response_lengths(count: int, longest: int) -> list[int]:
    rng = random.Random(1)
    return [rng.randint(8, longest) for _ in range(count)]


def rollout_ours(name: str, device: str) -> Callable[[], None]:
    """8 prompts of 64 tokens x 8 samples, up to 128 new tokens, ended at random lengths that are the same for both sides."""
    import torch

    import model as models

    _, tokenizer = models.load_config(name)
    model, prompts, ends = _loaded(name, device).eval(), _prompts(tokenizer, 8, 64), torch.tensor(_response_lengths(64, 128))
    draw, calls = models._draw, [0, torch.arange(64)]

    def ending(logits, u, temperature, top_p):  # forces the end token at each row's length
        token, logprob = draw(logits, u, temperature, top_p)
        token[token == tokenizer.eos_token_id] += 1
        calls[0] += 1
        over = ends[calls[1]] <= calls[0]
        token[over.to(token.device)] = tokenizer.eos_token_id
        left = (~over).nonzero().squeeze(1)  # as the sampler closes its gaps
        kept = torch.arange(len(left))
        kept[over[: len(left)]] = left[left >= len(left)]
        calls[1] = calls[1][kept]
        return token, logprob

    models._draw = ending

    def step() -> None:
        calls[:] = [0, torch.arange(64)]
        out = models.sample(model, tokenizer, prompts, 8, 128, generator=torch.Generator().manual_seed(0), stop=frozenset([tokenizer.eos_token_id]))
        assert sorted(len(s.ids) for s in out) == sorted(ends.tolist())

    return step


def rollout_generate(name: str, device: str) -> Callable[[], None]:
    """transformers' generate with the same prompts and lengths."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    import model as models

    _, tokenizer = models.load_config(name)
    model, prompts, ends = _loaded(name, device).eval(), _prompts(tokenizer, 8, 64), torch.tensor(_response_lengths(64, 128))

    class Ending(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, tokenizer.eos_token_id] = -math.inf
            over = (ends <= ids.shape[1] - 64 + 1).to(scores.device)
            scores[over] = -math.inf
            scores[over, tokenizer.eos_token_id] = 0.0
            return scores

    ids = torch.tensor(prompts, device=_device(device)).repeat_interleave(8, 0)

    def step() -> None:
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=128, min_new_tokens=0,
                           eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, logits_processor=LogitsProcessorList([Ending()]))

    return step


GRPO = {"prompts": 8, "samples": 8, "prompt": 40, "new": 64}


def grpo_ours(name: str, device: str) -> Callable[[], None]:
    """8 prompts of 40 tokens x 8 samples of exactly 64 tokens, random rewards: rollout, loss, AdamW step."""
    import torch
    import torch.distributed as dist

    import amft
    import model as models

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _, tokenizer = models.load_config(name)
    args = amft.with_defaults(amft.Args(method="rl", samples=8, prompts_per_step=8, max_new_tokens=64))
    policy = amft.Policy(_loaded(name, device), False).train()
    optimizer = torch.optim.AdamW([{"params": list(policy.parameters()), "lr": 1e-6, "peak": 1e-6}], fused=True)
    learner = amft.Learner(args, policy, optimizer, amft.World(_device(device)), tokenizer.pad_token_id)
    prompts, rng = _prompts(tokenizer, 8, GRPO["prompt"]), random.Random(0)

    def step() -> None:
        with models.gathered(policy):
            out = models.sample(policy.lm, tokenizer, prompts, 8, GRPO["new"], generator=torch.Generator().manual_seed(0), stop=frozenset([-1]))
        turns = [models.Turn(prompts[i // 8], s.ids, s.logprobs, True, "", float(rng.random() < 0.5)) for i, s in enumerate(out)]
        groups = [[models.Episode([t]) for t in turns[i : i + 8]] for i in range(0, 64, 8)]
        rl, _ = amft.rl_rows(args, groups, [models.Episode([turns[0]])] * 8)
        amft.set_weights(args, learner.world, rl, [])
        learner.backward(rl, "rl")
        learner.take_step([amft.local(p.grad) for p in learner.params], 1.0)

    return step


def grpo_trl(name: str, device: str) -> Callable[[], None]:
    """TRL's GRPOTrainer with the same prompts, lengths and rewards; it runs in a thread, and a callback lets one step through at a time."""
    import threading

    import datasets
    import transformers
    import trl

    import model as models

    _, tokenizer = models.load_config(name)
    tokenizer.padding_side = "left"
    prompts, rng, go, done = [tokenizer.decode(p) for p in _prompts(tokenizer, GRPO["prompts"], GRPO["prompt"])], random.Random(0), threading.Semaphore(0), threading.Semaphore(0)

    class OneAtATime(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.acquire()

        def on_step_end(self, *args, **kwargs):
            done.release()

    config = trl.GRPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=64, num_generations=8, max_completion_length=GRPO["new"], temperature=1.0, beta=0.0,
                            learning_rate=1e-6, max_steps=10**6, use_cpu=device == "cpu", bf16=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                            generation_kwargs={"min_new_tokens": GRPO["new"]}, gradient_checkpointing=False, shuffle_dataset=False)
    trainer = trl.GRPOTrainer(model=_loaded(name, device), reward_funcs=lambda completions, **kw: [float(rng.random() < 0.5) for _ in completions], args=config,
                              train_dataset=datasets.Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[OneAtATime()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> None:
        go.release()
        done.acquire()

    return step


# (label, ours, peer, the peer's package, target of peer / ours in time)
PAIRS = {
    "fomaml": [("FOMAML meta-step, T=4, K=5, 4 x 96 tokens, against TorchOpt MetaSGD", "fomaml_ours", "fomaml_torchopt", "torchopt", 2.5),
               ("the same, against a deep copy a task", "fomaml_ours", "fomaml_deepcopy", None, 1.0),
               ("the same, against its bare forward and backward passes (floor)", "fomaml_ours", "fomaml_floor", None, 1 / 1.05)],
    "meta_lora": [("MeTA-LoRA round, T=4, K=10, 4 x 96 tokens a task, against PEFT task after task", "lora_ours:4:96", "lora_peft:4:96", "peft", 1.2),
                  ("the same, 1 x 32 tokens a task", "lora_ours:1:32", "lora_peft:1:32", "peft", 2.0)],
    "rollout": [("8 prompts x 8 samples, 64 + up to 128 tokens, against transformers generate", "rollout_ours", "rollout_generate", None, 6.0)],
    "amft": [("GRPO step, 8 x 8 x (40 + 64) tokens, against TRL GRPOTrainer", "grpo_ours", "grpo_trl", "trl", 4.0)],
}


# ---------------------------------------------------------------------------------------------------------------------
# Two processes that take turns


def worker(side: str, model: str, device: str) -> int:
    """The child: for each line on standard input one unit of work, its seconds printed; at the end the peak memory in bytes."""
    name, *numbers = side.split(":")
    step = globals()[name](model, device, *map(int, numbers))
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        except OSError:
            pass
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"\n@{time.perf_counter() - start}", flush=True)
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")) - before
    print(f"\n@{peak}", flush=True)
    os._exit(0)  # a peer's trainer may still wait in its thread


def _resident(key: str) -> int:
    """Bytes, of /proc/self/status (0 where there is none: memory is not measured on a Mac)."""
    try:
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    except OSError:
        return 0


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Worker:
    def __init__(self, side: str, model: str, device: str):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", side, "--model", model, "--device", device], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, cwd=HERE)
        self._read("ready")

    def _read(self, start: str) -> str:
        for line in self.process.stdout:
            if line.startswith(start):
                return line[len(start) :]
        self.log.seek(0)
        raise RuntimeError((self.log.read().strip().splitlines() or ["ended"])[-1])

    def go(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._read("@"))

    def finish(self) -> float:
        self.process.stdin.close()
        peak = float(self._read("@"))
        self.process.wait()
        return peak


def version(package: str | None) -> str | None:
    """"" for a peer that needs no package, None for one that is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}" if package else ""
    except importlib.metadata.PackageNotFoundError:
        return None


def compare(label: str, ours: str, peer: str, package: str | None, target: float, args) -> dict:
    """One row: medians, the ratio peer / ours of neighbouring steps with its range, peak memory."""
    found = version(package)
    if found is None:
        return {"work": label, "missing": f"not installed: pip install {package}"}
    a, b = Worker(ours, args.model, args.device), Worker(peer, args.model, args.device)
    for _ in range(args.warmup):
        a.go(), b.go()
    pairs = [(a.go(), b.go()) for _ in range(args.repeats)]
    ratios = sorted(y / x for x, y in pairs)
    return {"work": label, "peer": found or "", "ours_seconds": statistics.median(x for x, _ in pairs), "peer_seconds": statistics.median(y for _, y in pairs),
            "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "ours_bytes": a.finish(), "peer_bytes": b.finish(), "target": target}


def row(r: dict) -> str:
    if "missing" in r:
        return f"| {r['work']} | | | {r['missing']} | | |"
    memory = f"{r['ours_bytes'] / 1e6:.0f}, {r['peer_bytes'] / 1e6:.0f} MB ({r['peer_bytes'] / max(r['ours_bytes'], 1):.1f})" if r.get("ours_bytes") else "-"
    return (f"| {r['work']}{' (' + r['peer'] + ')' if r['peer'] else ''} | {r['ours_seconds']:.3g} s | {r['peer_seconds']:.3g} s | **{r['ratio']:.2f}** ({r['low']:.2f} to {r['high']:.2f}) "
            f"| {r['target']:.2f} | {memory} |")


# ---------------------------------------------------------------------------------------------------------------------
# What is not a pair of steps


def bench_controller(args) -> list[str]:
    """AMFT's controller: (19 plain steps + 1 update step) / 20 plain steps, all of one run, with K = 20 steps between updates."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 20 * args.repeats + 1
        subprocess.run([sys.executable, "amft.py", "--model", "tiny_bare", "--steps", str(steps), "--mu-every", "20", "--warmup-steps", "1", "--eval-every", "-1", "--show", "0",
                        "--save-every", str(steps), "--output-dir", f"{folder}/run"], cwd=HERE, check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    ratios = []
    for i, r in enumerate(rows):
        if "grad_mu" in r:
            plain = statistics.mean(x["seconds"] for x in rows[max(2, i - 10) : i + 10] if "grad_mu" not in x)
            ratios.append((19 * plain + r["seconds"]) / (20 * plain))
    return [f"| AMFT's controller at K = 20: step with it / step without (tiny_bare, 16 x 8 samples) | | | **{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f}) | 1.10 | |"]


def bench_checker(args) -> list[str]:
    """Ours and Math-Verify on the same rows, one after the other, every cache of ours cleared for each."""
    if not args.cases:
        return ["| checker against Math-Verify | | | give --cases FILE with rows {\"response\", \"gold\"} | | |"]
    if (found := version("math-verify")) is None:
        return ["| checker against Math-Verify | | | not installed: pip install math-verify | | |"]
    import math_verify

    import checker

    rows = [json.loads(line) for line in Path(args.cases).read_text().splitlines()]
    caches = [f for f in vars(checker).values() if hasattr(f, "cache_clear")]
    ours, theirs = [], []
    for r in rows:
        for cache in caches:
            cache.cache_clear()
        start = time.perf_counter()
        checker.grade(r["response"], r["gold"])
        middle = time.perf_counter()
        try:
            math_verify.verify(math_verify.parse(f"${r['gold']}$"), math_verify.parse(r["response"]))
        except Exception:  # noqa: BLE001, S110 - it may fail on a row: the time counts all the same
            pass
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    lines = []
    for label, at in (("median", 0.5), ("99th percentile", 0.99)):
        x, y = (sorted(v)[min(len(v) - 1, int(at * len(v)))] for v in (ours, theirs))
        lines.append(f"| checker on {len(rows)} rows, {label}, against Math-Verify ({found}) | {1e3 * x:.3g} ms | {1e3 * y:.3g} ms | **{y / x:.1f}** | {'10' if at == 0.5 else ''} | |")
    return lines


def bench_startup(args) -> list[str]:
    """From the command to the end of the first meta-step, and where the time goes."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "fomaml.py", "--steps", "1", "--eval-every", "-1", "--output-dir", f"{folder}/run"], cwd=HERE,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        marks = {}
        while len(marks) < 2 and process.poll() is None:
            for name in ("args.json", "metrics.jsonl"):
                file = Path(folder) / "run" / name
                if name not in marks and file.exists() and file.stat().st_size:
                    marks[name] = time.perf_counter() - start
            time.sleep(0.005)
        process.wait()
        first = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text())["seconds"]
    imports = min(_seconds([sys.executable, "-c", "import fomaml"]) for _ in range(2))
    launcher = min(_seconds([sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "true"]) for _ in range(2))
    a, b = marks["args.json"], marks["metrics.jsonl"]
    lines.append(f"| torchrun fomaml.py to the end of its first meta-step | {b:.1f} s | | | | |")
    lines.append(f"| of that: torchrun itself {launcher:.1f}, imports {imports:.1f}, problems and tokens {max(0.0, a - launcher - imports):.1f}, weights {max(0.0, b - a - first):.1f}, the step {first:.1f} s | | | | | |")
    return lines


def _seconds(command: list[str]) -> float:
    return timed(lambda: subprocess.run(command, cwd=HERE, check=True, capture_output=True))


class Size(NamedTuple):
    """A model on paper: parameters, layers, width, vocabulary."""

    name: str
    parameters: float
    layers: int
    hidden: int
    vocabulary: int


def _random_llama(width: int, folder: str) -> int:
    """A random Llama of four layers and 653 tokens in a folder, as wide as asked; the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=653, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=width // 32,
                                         num_key_value_heads=width // 32, tie_word_embeddings=True))
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def bench_scaling(args) -> list[str]:
    """Time and memory of a meta-step over T, K, sequence length and model size, 1 against 2 ranks; and large models on paper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import plots

    series = {"T (K = 5)": [(t, args.model, t, 5, 96) for t in (1, 2, 4, 8)], "K + 1 (T = 2)": [(k + 1, args.model, 2, k, 96) for k in (1, 3, 7, 15)],
              "tokens a row (T = 2, K = 2)": [(n, args.model, 2, 2, n) for n in (32, 64, 128, 256)], "million parameters (T = 2, K = 2)": []}
    found, lines, folder = {}, [], tempfile.TemporaryDirectory()
    for width in (64, 128, 256, 512):
        series["million parameters (T = 2, K = 2)"].append((_random_llama(width, f"{folder.name}/{width}") / 1e6, f"{folder.name}/{width}", 2, 2, 96))
    for name, points in series.items():
        found[name] = []
        for x, model, t, k, length in points:
            w = Worker(f"fomaml_ours:{t}:{k}:4:{length}", model, args.device)
            w.go()
            seconds = statistics.median(w.go() for _ in range(max(3, args.repeats // 2)))
            found[name].append((x, seconds, w.finish()))
        xs, ys = [math.log(p[0]) for p in found[name]], [math.log(p[1]) for p in found[name]]
        mx, my = statistics.mean(xs), statistics.mean(ys)
        slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)
        memory = [p[2] / 1e6 for p in found[name]]
        lines.append(f"| meta-step time over {name}, {points[0][0]:.3g} to {points[-1][0]:.3g} | {found[name][0][1]:.2f} to {found[name][-1][1]:.2f} s | | exponent {slope:.2f} | | {memory[0]:.0f} to {memory[-1]:.0f} MB |")
    folder.cleanup()
    with plt.rc_context(plots.STYLE):
        fig, axes = plt.subplots(2, 2, figsize=(7.4, 6))
        for axis, (name, points) in zip(axes.flat, found.items(), strict=True):
            axis.loglog([p[0] for p in points], [p[1] for p in points], "-o", color=plots.COLOURS[0], label="seconds a meta-step")
            axis.loglog([p[0] for p in points], [p[2] / 1e9 for p in points], "--s", color=plots.COLOURS[1], label="peak memory (GB)")
            axis.loglog([points[0][0], points[-1][0]], [points[0][1], points[0][1] * points[-1][0] / points[0][0]], ":", color="#888888", linewidth=1, label="linear")
            axis.set(xlabel=name)
            axis.set_xticks([p[0] for p in points], [f"{p[0]:.2g}" if p[0] < 10 else f"{p[0]:.0f}" for p in points])
            axis.minorticks_off()
            axis.legend()
        fig.savefig(args.figure)
        plt.close(fig)
    for label, ranks, extra in (("one rank", 1, []), ("two ranks that share the shards", 2, []), ("two replicas", 2, ["--replicas", "2"])):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "fomaml.py", "--model", args.model, "--steps", "8", "--eval-every", "-1",
                            "--gain-every", "0", "--save-every", "8", "--output-dir", f"{folder}/run", *extra], cwd=HERE, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            rows = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
            lines.append(f"| fomaml.py, default meta-step, {label}, one thread each | {statistics.median(r['seconds'] for r in rows[2:]):.2f} s | | | | {rows[-1]['peak_memory_gb']:.2f} GB a rank, libraries included |")
    lines += on_paper()
    return lines


def on_paper() -> list[str]:
    """FOMAML and AMFT on H100s, from bytes and FLOPs. Assumptions: fp32 master weights, copy, accumulator and Adam's two, 20 bytes a
    parameter over the shards (16 for AMFT); bf16 compute at 40% of 989 TFLOP/s; 6 FLOPs a parameter and token, 8 with recomputed activations; one layer's weights
    and gradient unsharded at a time; activations of one row of 2,048 tokens a rank, recomputed; reference setting T = 4, K = 5, 4 x 2,048 tokens.
    All-gather and reduce-scatter move 2 + 2 + 4 bytes a parameter and pass at 300 GB/s (NVLink, one node of 8) or 40 GB/s (64 GPUs), not overlapped."""
    lines = ["", "Large models on paper, FOMAML, reference setting (T = 4, K = 5, 4 x 2,048 tokens a batch), H100, recomputed activations:", "",
             "| model | GPUs (replicas x shards) | memory a GPU | compute a step | communication a step, not overlapped |", "|---|---|---|---|---|"]
    for m in (Size("4B (36 layers, 2560)", 4.0e9, 36, 2560, 151_936), Size("7B (28 layers, 3584)", 7.6e9, 28, 3584, 152_064)):
        for gpus, replicas in ((4, 1), (8, 2), (64, 4)):
            shards = gpus // replicas
            rows = 1
            held = 20 * m.parameters / shards + 2 * 6 * m.parameters / m.layers
            tokens = rows * 2048
            activations = tokens * m.hidden * m.layers * 4 + tokens * m.vocabulary * 8
            passes = 4 / replicas * 6
            compute = passes * 8 * m.parameters * rows * 2048 / (0.4 * 989e12)  # each rank has a row of every batch
            bandwidth = 300e9 if gpus <= 8 else 40e9
            communication = passes * 8 * m.parameters * (shards - 1) / shards / bandwidth
            note = "" if shards <= 4 else ", batches of 16 rows: four times the tokens"
            lines.append(f"| {m.name} | {gpus} ({replicas} x {shards}){note} | {(held + activations) / 1e9:.0f} GB | {compute:.1f} s | {communication:.1f} s |")
    return lines


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """Time ours beside its peers."""

    names: tyro.conf.Positional[tuple[Literal["fomaml", "meta_lora", "rollout", "amft", "checker", "startup", "scaling"], ...]] = ("fomaml", "meta_lora", "rollout", "amft", "checker", "startup")
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


def main(args: Args) -> int:
    if args.worker:
        return worker(args.worker, args.model, args.device)
    import torch

    import model as models

    models.load_config(args.model)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.py: --device cuda, but there is no GPU", file=sys.stderr)
        return 2
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s)"
    print(f"{machine}, python {platform.python_version()}, torch {torch.__version__}, model {args.model}, {time.strftime('%Y-%m-%d')}\n", flush=True)
    print("| work | ours | peer | peer / ours (range) | target | memory over the loaded model: ours, peer (ratio) |\n|---|---|---|---|---|---|", flush=True)
    results, failed = [], 0
    for name in args.names:
        for label, ours, peer, package, target in PAIRS.get(name, []):
            try:
                results.append(compare(label, ours, peer, package, target, args))
                print(row(results[-1]), flush=True)
            except RuntimeError as e:
                failed = 1
                print(f"| {label} | | | failed: {e} | | |", flush=True)
        for more in {"amft": [bench_controller], "checker": [bench_checker], "startup": [bench_startup], "scaling": [bench_scaling]}.get(name, []):
            print("\n".join(more(args)), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (ValueError, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)

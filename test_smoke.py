"""Tests of the mathematics and of what users do. `pytest test_smoke.py` runs all of it in some minutes on 2 CPU cores.

Gradients are compared with independent computations (functional_call, finite differences, torch.optim), runs with interrupted
runs, two ranks with one. Run as a script under torchrun this file is the two-rank half of one test (see `gradients_main`).
"""

import copy
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist

import amft
import bench
import checker
import data
import eval as evaluation
import fomaml
import games
import meta_lora
import model as models
from data import Encoded, Episode, Example

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data folder ../shared, which is not part of the repository")


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def small_llama(dtype=torch.float64, **changes):
    """A random Llama. In float64 it has torch's own RMSNorm, as transformers' computes in float32, too coarse for differences."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 128} | changes
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    if dtype == torch.float64:
        for owner in [m for m in model.modules()]:
            for name, child in owner.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(owner, name, torch.nn.RMSNorm(settings["hidden_size"], 1e-6, dtype=dtype))
    with torch.no_grad():  # larger weights than the usual initialisation: gradients that matter
        for p in model.parameters():
            p.mul_(3.0) if p.ndim > 1 else None
    return model


def random_episodes(count, k_rows, query_rows, seed=0, vocab=64):
    """Episodes of random tokens and lengths, and their token ids."""
    rng, tokens, episodes = random.Random(seed), {}, []
    for t in range(count):
        rows = []
        for i in range(k_rows + query_rows):
            e = Example("", "", "", "", 0, f"{t}/{i}")
            n, p = rng.randint(8, 40), rng.randint(2, 6)
            tokens[e.id] = Encoded([rng.randrange(vocab) for _ in range(n)], p)
            rows.append(e)
        episodes.append(Episode(f"task{t}", rows[:k_rows], rows[k_rows:]))
    return episodes, tokens


def plain_learner(model, tokens, **options):
    micro_batch = options.pop("micro_batch", 0)
    return fomaml.Learner(model, fomaml.Buffers(model, **{"inner_lr": 0.05} | options), fomaml.World(torch.device("cpu")), 0, tokens, micro_batch)


def reference_loss(forward, rows):
    """Mean over response tokens, computed row by row without padding: independent of collate and token_loss."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        logprobs = forward(ids)[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[row.prompt_length - 1 :]
        total, count = total - picked.sum(), count + len(picked)
    return total / count


def functional(model, weights):
    return lambda ids: torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits


def chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def bits(model):
    return {n: fomaml.local(p).clone() for n, p in model.named_parameters()}


def run(*args, ranks=0, env=None, **kwargs):
    """python (or torchrun with that many ranks) with arguments; returns the finished process."""
    launcher = [sys.executable] if not ranks else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run([*launcher, *map(str, args)], cwd=HERE, env=os.environ | (env or {}), capture_output=True, text=True, timeout=400, **kwargs)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with a random Llama of 60k parameters and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    _, tokenizer = models.load_config("tiny")
    model = small_llama(torch.float32, vocab_size=len(tokenizer) + 8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():  # a script's cli() ends it too
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The meta-gradient against independent computations


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"inner_optimizer": "adam", "inner_lr": 0.002}, {"inner_clip": 0.5}],
                         ids=["sgd", "micro-batches", "adam", "clip"])
def test_fomaml_gradient(options):
    """mean_i grad L_query(theta_i), theta_i by functional_call and torch.optim, no in-place update, no padding."""
    model, K, B = small_llama(), 3, 2
    episodes, tokens = random_episodes(3, K * B, 4)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = {n: torch.zeros_like(p) for n, p in theta.items()}
    losses = []
    for episode in episodes:
        fast = {n: p.clone().requires_grad_() for n, p in theta.items()}
        optimizer = (torch.optim.Adam if options.get("inner_optimizer") == "adam" else torch.optim.SGD)(fast.values(), lr=options.get("inner_lr", 0.05))
        for rows in chunks(episode.support, B):
            support = reference_loss(functional(model, fast), [tokens[e.id] for e in rows])
            for p, g in zip(fast.values(), torch.autograd.grad(support, list(fast.values())), strict=True):
                p.grad = g
            if "inner_clip" in options:
                torch.nn.utils.clip_grad_norm_(fast.values(), options["inner_clip"])
            optimizer.step()
        query = reference_loss(functional(model, fast), [tokens[e.id] for e in episode.query])
        for n, g in zip(fast, torch.autograd.grad(query, list(fast.values())), strict=True):
            expected[n] += g / len(episodes)
        before = reference_loss(functional(model, theta), [tokens[e.id] for e in episode.query])
        losses.append([support.item(), query.item(), before.item()])

    learner = plain_learner(model, tokens, **options)
    got = fomaml.meta_gradient(learner, episodes, "fomaml", B, len(episodes), measure_gain=True)
    torch.testing.assert_close(got.double(), torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    for (n, e), g in zip(expected.items(), learner.buffers.meta, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11, msg=n)
    for n, p in model.named_parameters():
        assert torch.equal(p, theta[n]) and p.grad is None, n  # theta bitwise intact, no gradient left


def test_maml_gradient():
    """The exact second-order gradient against central finite differences of the meta-objective, and unlike the first order."""
    model, K, B = small_llama(), 3, 2
    episodes, tokens = random_episodes(2, K * B, 3)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}

    def objective(weights):
        total = 0.0
        for episode in episodes:
            fast = {n: p.clone().requires_grad_() for n, p in weights.items()}
            for rows in chunks(episode.support, B):
                loss = reference_loss(functional(model, fast), [tokens[e.id] for e in rows])
                grads = torch.autograd.grad(loss, list(fast.values()))
                fast = {n: (p - 0.05 * g).detach().requires_grad_() for (n, p), g in zip(fast.items(), grads, strict=True)}
            with torch.no_grad():
                total += reference_loss(functional(model, fast), [tokens[e.id] for e in episode.query]).item() / len(episodes)
        return total

    gradients = {}
    for method in ("maml", "fomaml"):
        learner = plain_learner(model, tokens)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one with second derivatives
            fomaml.meta_gradient(learner, episodes, method, B, len(episodes))
        gradients[method] = dict(zip(theta, (g.clone() for g in learner.buffers.meta), strict=True))
        model = copy.deepcopy(model)
    for seed in range(3):
        torch.manual_seed(seed)
        direction = {n: torch.randn_like(p) for n, p in theta.items()}
        h = 1e-5
        difference = (objective({n: p + h * direction[n] for n, p in theta.items()}) - objective({n: p - h * direction[n] for n, p in theta.items()})) / (2 * h)
        slopes = {m: sum((g[n] * direction[n]).sum().item() for n in theta) for m, g in gradients.items()}
        assert slopes["maml"] == pytest.approx(difference, rel=1e-5, abs=1e-7)
        assert abs(slopes["fomaml"] - difference) > 100 * abs(slopes["maml"] - difference)


def test_reptile_and_joint():
    """Reptile: mean of theta_i - theta after K+1 steps. Joint: the gradient of the token mean over all rows."""
    model, K, B = small_llama(), 2, 2
    episodes, tokens = random_episodes(3, K * B, 2)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = {n: torch.zeros_like(p) for n, p in theta.items()}
    for episode in episodes:
        fast = {n: p.clone().requires_grad_() for n, p in theta.items()}
        for rows in [*chunks(episode.support, B), episode.query]:
            grads = torch.autograd.grad(reference_loss(functional(model, fast), [tokens[e.id] for e in rows]), list(fast.values()))
            fast = {n: (p - 0.05 * g).detach().requires_grad_() for (n, p), g in zip(fast.items(), grads, strict=True)}
        for n in expected:
            expected[n] += (fast[n].detach() - theta[n]) / 3
    learner = plain_learner(model, tokens)
    fomaml.meta_gradient(learner, episodes, "reptile", B, 3)
    for e, g in zip(expected.values(), learner.buffers.meta, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-11)

    rows = [tokens[e.id] for ep in episodes for e in ep.support + ep.query]
    weights = {n: p.clone().requires_grad_() for n, p in theta.items()}
    grads = torch.autograd.grad(reference_loss(functional(model, weights), rows), list(weights.values()))
    fomaml.meta_gradient(learner, episodes, "joint", B, 3, union_tokens=data.response_tokens(rows))
    for e, g in zip(grads, learner.buffers.meta, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-11)
    assert all(torch.equal(p, theta[n]) for n, p in model.named_parameters())


GRADIENT_CASES = ("shards", "replicas", "activation_checkpointing", "offload_theta", "adam")


def gradients_main(folder: Path) -> None:
    """Under torchrun (or alone): the meta-gradient and losses of FSDP2 models in several settings, written to folder."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kwargs = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **kwargs)
    rank, size = dist.get_rank(), dist.get_world_size()
    episodes, tokens = random_episodes(2, 6, 4)
    results = {}
    for case in GRADIENT_CASES:
        source = small_llama(torch.float32, tie_word_embeddings=case != "shards")
        replicas = size if case == "replicas" else 1
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replica", "shard"))
        model = models.skeleton(source.config)
        if case == "activation_checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in models.layers_to_shard(model):
            fully_shard(block, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        models.materialize(model, source if rank == 0 else None, torch.device("cpu"))
        model.train()
        world = fomaml.World(torch.device("cpu"), rank, size, rank // (size // replicas), replicas, mesh)
        adam = {"inner_optimizer": "adam", "inner_lr": 0.002} if case == "adam" else {"inner_lr": 0.05}
        buffers = fomaml.Buffers(model, offload=case == "offload_theta", **adam)
        learner = fomaml.Learner(model, buffers, world, 0, tokens)
        before = bits(model)
        mine = episodes[world.replica :: replicas] if replicas > 1 else episodes
        part = fomaml.meta_gradient(learner, mine, "fomaml", 2, 2)
        losses = torch.zeros(2, 3)
        losses[world.replica :: replicas] = part
        dist.all_reduce(losses)
        after = bits(model)
        assert all(torch.equal(before[n], after[n]) for n in before), f"{case}: theta changed"
        fomaml.set_gradients(buffers)
        grads = {n: fomaml.full(p.grad) for n, p in model.named_parameters()}
        weights = models.full_weights(model, torch.float32)
        results[case] = {"losses": losses, "grads": grads, "weights": weights}
    if rank == 0:
        torch.save(results, folder / f"gradients{size}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    """Shards, replicas, activation checkpointing, offloaded buffers: 1 rank, 2 ranks and no FSDP at all agree to 1e-5."""
    for ranks in (0, 2):
        done = run("test_smoke.py", tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"gradients{n}.pt") for n in (1, 2))
    episodes, tokens = random_episodes(2, 6, 4)
    for case in GRADIENT_CASES:
        plain = small_llama(torch.float32, tie_word_embeddings=case != "shards")
        learner = plain_learner(plain, tokens, **({"inner_optimizer": "adam", "inner_lr": 0.002} if case == "adam" else {}))
        fomaml.meta_gradient(learner, episodes, "fomaml", 2, 2)
        scale = max(g.abs().max() for g in learner.buffers.meta).item()
        for (name, _), g in zip(plain.named_parameters(), learner.buffers.meta, strict=True):
            for got in (one, two):
                torch.testing.assert_close(got[case]["grads"][name], g, rtol=1e-4, atol=1e-5 * scale, msg=f"{case} {name}")
        torch.testing.assert_close(one[case]["losses"], two[case]["losses"], rtol=1e-5, atol=1e-5)
        for name, value in plain.state_dict().items():
            assert torch.equal(one[case]["weights"][name], value) and torch.equal(two[case]["weights"][name], value), (case, name)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: resume, kill, signals, failures

RUN = ["--steps", "6", "--save-every", "2", "--eval-every", "3", "--eval-problems", "4", "--eval-tasks", "2", "--eval-max-new-tokens", "4",
       "--inner-steps", "2", "--tasks-per-step", "2", "--support-batch", "2", "--query-batch", "2", "--gain-every", "2"]


AMFT_RUN = ["--model", "tiny_bare", "--steps", "14", "--save-every", "4", "--eval-every", "7", "--eval-problems", "6", "--prompts-per-step", "4", "--samples", "4",
            "--max-new-tokens", "24", "--validation-prompts", "4", "--validation-size", "8", "--mu-every", "1", "--warmup-steps", "2", "--show", "1", "--micro-batch", "8"]


def final_weights(folder):
    from safetensors.torch import load_file

    (file,) = (folder / "checkpoint").glob("*model.safetensors")  # model.safetensors or adapter_model.safetensors
    return load_file(file)


def rows(folder, name="metrics.jsonl"):
    noise = ("seconds", "tokens_per_second", "peak_memory_gb")
    return [{k: v for k, v in json.loads(line).items() if k.split("/")[0] not in noise} for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("script,ranks", [("fomaml.py", 0), ("fomaml.py", 2), ("meta_lora.py", 0), ("meta_lora.py", 2), ("amft.py", 0)])
def test_kill_and_resume(script, ranks, tmp_path, small_model):
    """SIGKILL in the middle, --resume: weights, metrics and evaluations equal the uninterrupted run's, bit for bit."""
    common = [script, "--model", small_model, *RUN] if script != "amft.py" else [script, *AMFT_RUN]
    steps = 14 if script == "amft.py" else 6
    whole = run(*common, "--output-dir", tmp_path / "whole", ranks=ranks)
    assert whole.returncode == 0, whole.stderr[-3000:]
    picture = "dynamics.png" if script == "amft.py" else "curves.png"
    assert "model: " in whole.stdout and (tmp_path / "whole" / picture).stat().st_size > 10_000

    launcher = [sys.executable] if not ranks else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    cut = tmp_path / "cut"
    process = subprocess.Popen([*launcher, *map(str, common), "--output-dir", str(cut)], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    stop_at = random.randint(2, steps - 1)
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and not ((cut / "metrics.jsonl").exists() and len((cut / "metrics.jsonl").read_text().splitlines()) >= stop_at):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if ranks:  # torchrun starts each worker in a session of its own
        subprocess.run(["pkill", "-KILL", "-f", str(cut)])
        time.sleep(0.5)
    with open(cut / "metrics.jsonl", "a") as f:
        f.write(f'{{"step": {steps}, "half a li')  # what a kill can leave
    resumed = run(*common, "--output-dir", cut, "--resume", ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    a, b = final_weights(tmp_path / "whole"), final_weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert rows(tmp_path / "whole") == rows(cut) and [r["step"] for r in rows(cut)] == list(range(1, steps + 1))
    assert rows(tmp_path / "whole", "evaluations.jsonl") == rows(cut, "evaluations.jsonl")
    flag = "--lr" if script == "amft.py" else "--inner-lr"
    other = run(*common, "--output-dir", cut, "--resume", flag, "0.2") if not ranks else None
    assert other is None or (other.returncode == 2 and flag in other.stderr)
    if script == "amft.py":
        assert rows(tmp_path / "whole", "samples.jsonl") == rows(cut, "samples.jsonl")
        assert any(abs(r.get("mu_change/meta_gradient", 0)) > 0 for r in rows(cut)) and rows(cut)[-1]["mu"] != 0.5
    if script != "meta_lora.py":
        from transformers import AutoModelForCausalLM

        assert AutoModelForCausalLM.from_pretrained(cut / "checkpoint").num_parameters() > 0


def test_lora_two_ranks_equal_one(tmp_path, small_model):
    """One round with the tasks split over two ranks and the base sharded equals one rank's."""
    common = ["meta_lora.py", "--model", small_model, *RUN, "--steps", "1", "--dropout", "0", "--inner-optimizer", "sgd", "--inner-lr", "0.1", "--eval-every", "0"]
    for ranks in (0, 2):
        done = run(*common, "--output-dir", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (final_weights(tmp_path / str(r)) for r in (0, 2))
    metrics = [rows(tmp_path / str(r))[0] for r in (0, 2)]
    assert metrics[0]["meta/grad_norm"] == pytest.approx(metrics[1]["meta/grad_norm"], rel=1e-5) and metrics[0]["meta/loss"] == pytest.approx(metrics[1]["meta/loss"], rel=1e-5)
    assert all(torch.allclose(one[n], two[n], atol=3e-5) for n in one)


def test_amft_two_ranks_equal_one(tmp_path):
    """The same checkpoint taken one step further, a step with a meta-gradient, by one rank and by two that share its shards."""
    common = ["amft.py", *AMFT_RUN, "--steps", "11", "--save-every", "10", "--mu-every", "11", "--eval-every", "-1", "--advantage", "gae", "--entropy-coefficient", "0.01"]
    first = run(*common, "--output-dir", tmp_path / "1")
    assert first.returncode == 0, first.stderr[-3000:]
    shutil.copytree(tmp_path / "1", tmp_path / "2", symlinks=True)
    shutil.rmtree(tmp_path / "2" / "step-000011")
    second = run(*common, "--output-dir", tmp_path / "2", "--resume", ranks=2)
    assert second.returncode == 0, second.stderr[-3000:]
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one[:10] == two[:10] and len(two) == 11
    for key in ("grad_norm", "loss/rl", "loss/sft", "loss/value", "entropy", "reward/mean", "response_length", "grad_mu", "mu"):
        assert one[10][key] == pytest.approx(two[10][key], rel=1e-3 if key == "grad_mu" else 1e-4, abs=1e-7), key
    a, b = final_weights(tmp_path / "1"), final_weights(tmp_path / "2")
    assert all(torch.allclose(a[n], b[n], atol=3e-5) for n in a)


@pytest.mark.parametrize("method,parts", [("amft", "both"), ("sft", "sft"), ("rl", "rl"), ("sft_then_rl", "first sft"), ("fixed", "both"), ("chord", "both"), ("luffy", "rl"), ("srft", "rl"), ("hpt", "both")])
def test_every_method_runs(method, parts, tmp_path, process_group, monkeypatch, problems=[]):  # noqa: B006 - made once for all methods
    """Two steps of each method through the whole script: the parts of the loss that belong to it are there, and no other."""
    args = amft.Args(method=method, steps=2, warmup_steps=0, prompts_per_step=8, samples=4, max_new_tokens=32, validation_size=8, eval_every=-1, show=0, output_dir=str(tmp_path / "r"), sft_share=0.5)
    world = amft.World(torch.device("cpu"), mesh=dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard")))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    load = amft.load_task
    monkeypatch.setattr(amft, "load_task", lambda *a: problems[0] if problems else problems.append(load(*a)) or problems[0])
    assert amft.main(amft.with_defaults(args), world) == 0
    signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
    first, second = rows(tmp_path / "r")
    assert all(math.isfinite(r["grad_norm"]) and r["grad_norm"] > 0 for r in (first, second))
    has = lambda r: {k for k in ("rl", "sft") if r[f"loss/{k}"] != 0}  # noqa: E731
    expected = {"both": ({"rl", "sft"},) * 2, "sft": ({"sft"},) * 2, "rl": ({"rl"},) * 2, "first sft": ({"sft"}, {"rl"})}[parts]
    assert (has(first), has(second)) == expected


GAME_RUN = ["--steps", "2", "--warmup-steps", "1", "--prompts-per-step", "2", "--samples", "2", "--warmup-batch", "2", "--eval-problems", "2", "--show", "1", "--micro-batch", "4", "--save-every", "2"]


@pytest.mark.parametrize("extra,ranks", [(["--task", "virl", "--max-new-tokens", "64"], 2), (["--task", "general_points", "--vision", "--max-new-tokens", "48"], 0)], ids=["virl on two ranks", "vision"])
def test_games_run(extra, ranks, tmp_path):
    """Ranks with different numbers of turns keep step; pictures go through rollout, loss and checkpoint."""
    done = run("amft.py", *GAME_RUN, *extra, "--output-dir", tmp_path / "r", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    last = rows(tmp_path / "r")[-1]
    assert len(rows(tmp_path / "r")) == 2 and math.isfinite(last["loss/rl"]) and last["grad_norm"] > 0 and (tmp_path / "r" / "dynamics.png").exists()
    if "--vision" in extra:
        assert "recognition" in done.stdout
        config, _ = models.load_config(str(tmp_path / "r" / "checkpoint"))
        assert models.load_processor(str(tmp_path / "r" / "checkpoint")).image_processor is not None and models.auto_class(config).from_pretrained(tmp_path / "r" / "checkpoint").num_parameters() > 1e6


def test_interrupt_saves(tmp_path, small_model):
    """SIGINT: a checkpoint at the last finished step, exit status 0, the message says how to go on."""
    process = subprocess.Popen([sys.executable, "fomaml.py", "--model", str(small_model), *RUN, "--steps", "100000", "--eval-every", "-1", "--save-every", "100000",
                                "--output-dir", str(tmp_path / "r")], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-2000:]
    done = len(rows(tmp_path / "r"))
    assert f"stopped at step {done}" in out and "--resume" in out and (tmp_path / "r" / f"step-{done:06d}" / "state" / "extra.json").exists()


def test_non_finite_steps(tmp_path, small_model):
    """An inner learning rate that overflows: steps are skipped and counted, after 5 the run ends with status 1 and theta unharmed."""
    done = run("fomaml.py", "--model", small_model, *RUN, "--steps", "20", "--eval-every", "-1", "--inner-lr", "1e30", "--output-dir", tmp_path / "r")
    assert done.returncode == 1 and "not finite in 5 steps" in done.stderr and "Traceback" not in done.stderr
    assert [r["skipped_steps"] for r in rows(tmp_path / "r")] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# MeTA-LoRA


def lora_learner(model, tokens, **options):
    """A learner on float64 adapters whose B is not zero, so that every gradient matters."""
    settings = {"r": 3, "alpha": 6, "dropout": 0.0, "inner_steps": 3, "support_batch": 2, "inner_lr": 0.02, "inner_optimizer": "sgd"} | options
    args = meta_lora.Args(**settings)
    adapters = meta_lora.Adapters(model.requires_grad_(False), args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    adapters.phi = [0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in adapters.phi]
    return meta_lora.Learner(model, adapters, args, fomaml.World(torch.device("cpu")), 0, tokens)


def test_lora_dropout():
    """Its share, scale, mask in the gradient, independence of neighbours (four share a random number), and determinism."""
    x = torch.ones(64, 33, 127, requires_grad=True)
    torch.manual_seed(0)
    y = meta_lora.dropout(x, 0.05)
    y.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(y, meta_lora.dropout(x, 0.05)) and torch.equal(x.grad, y.detach())
    dropped = (y == 0).flatten().double()
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.95]) and torch.equal(meta_lora.dropout(x, 0.0), x)
    for part in (dropped, *(dropped[k::4] for k in range(4)), dropped[:-1][dropped[1:] == 1], dropped[:-2][dropped[2:] == 1]):
        assert abs(part.mean().item() - 0.05) < 5 * math.sqrt(0.05 * 0.95 / len(part))


@pytest.mark.parametrize("options", [{}, {"inner_clip": 0.3}, {"inner_optimizer": "adam", "inner_lr": 0.003}], ids=["sgd", "clip", "adam"])
def test_lora_batched_stage_one(options):
    """All tasks in one forward equal task after task, whatever the chunk; the base is bitwise untouched."""
    model = small_llama()
    before = bits(model)
    episodes, tokens = random_episodes(3, 6, 4)
    learner = lora_learner(model, tokens, **options)
    steps = [[e.support[k : k + 2] for e in episodes] for k in (0, 2, 4)]
    learner.adapters.start(3)
    history = learner.inner_loop(steps)  # [K, T]
    together = [p.detach().clone() for p in learner.adapters.stack]
    for i in range(3):
        learner.adapters.start(1)
        alone = learner.inner_loop([[batches[i]] for batches in steps])
        torch.testing.assert_close(history[:, i], alone[:, 0], rtol=1e-9, atol=1e-10)
        for a, b in zip(together, learner.adapters.stack, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-7, atol=1e-9)
    whole, losses = meta_lora.meta_gradient(learner, episodes, "fomaml", 2, 3, measure_gain=True)
    learner.args.tasks_per_forward = 1
    chunked, same = meta_lora.meta_gradient(learner, episodes, "fomaml", 2, 3, measure_gain=True)
    torch.testing.assert_close(losses, same)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("method,optimizer", [("fomaml", "sgd"), ("fomaml", "adam"), ("reptile", "sgd"), ("joint", "sgd")])
def test_lora_meta_gradient(method, optimizer):
    """Against an independent computation: adapters folded into the weights (W + scale B A), functional_call, torch.optim."""
    model, lr = small_llama(), {"sgd": 0.02, "adam": 0.003}[optimizer]
    episodes, tokens = random_episodes(3, 4, 2)
    learner = lora_learner(model, tokens, inner_optimizer=optimizer, inner_lr=lr)
    phi, layers = learner.adapters.phi, list(learner.adapters.layers)
    plain = small_llama()  # the same weights, no hooks
    weights = {n: p.detach() for n, p in plain.named_parameters()}

    def folded(adapter):
        return functional(plain, weights | {f"{n}.weight": weights[f"{n}.weight"] + 2.0 * adapter[2 * i + 1] @ adapter[2 * i] for i, n in enumerate(layers)})

    expected = [torch.zeros_like(p) for p in phi]
    for episode in episodes:
        fast = [p.clone().requires_grad_() for p in phi]
        opt = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)(fast, lr=lr)
        for rows in chunks(episode.support, 2) + ([episode.query] if method == "reptile" else []):
            if method != "joint":
                opt.zero_grad()
                reference_loss(folded(fast), [tokens[e.id] for e in rows]).backward()
                opt.step()
        if method == "fomaml":
            grads = torch.autograd.grad(reference_loss(folded(fast), [tokens[e.id] for e in episode.query]), fast)
        else:
            grads = [p.detach() - q for p, q in zip(fast, phi, strict=True)]
        expected = [e + g / 3 for e, g in zip(expected, grads, strict=True)]
    union = [tokens[e.id] for ep in episodes for e in ep.support + ep.query]
    if method == "joint":
        leaves = [p.clone().requires_grad_() for p in phi]
        expected = torch.autograd.grad(reference_loss(folded(leaves), union), leaves)
    got, _ = meta_lora.meta_gradient(learner, episodes, method, 2, 3, union_tokens=data.response_tokens(union))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


def test_adapter_in_peft_and_merged(tmp_path, small_model, process_group):
    """The saved adapter gives the same logits in peft; so do the merged weights in transformers."""
    from transformers import AutoModelForCausalLM

    base = models.load_weights(str(small_model)).eval()
    args = meta_lora.Args(model=str(small_model), r=4, alpha=6, rank_stabilised=True)
    adapters = meta_lora.Adapters(base, args, torch.device("cpu"))
    adapters.phi = [0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(adapters.phi)]
    meta_lora.write_adapter(tmp_path, adapters, args)
    _, tokenizer = models.load_config("tiny")
    meta_lora.write_merged(tmp_path / "merged", base, adapters, tokenizer, torch.float32)
    ids = torch.randint(3, 90, (2, 20))
    adapters.start(1)
    with torch.no_grad():
        logits = base(ids).logits
        plain = models.load_weights(str(small_model)).eval()
        assert (plain(ids).logits - logits).abs().max() > 0.1
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits, logits, rtol=1e-4, atol=1e-4)
        peft = pytest.importorskip("peft", reason="peft is not installed; .ci/run installs it for this test")
        torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path).eval()(ids).logits, logits, rtol=1e-5, atol=1e-5)


def lora_rounds(name, length, rows, repeats):
    """[(seconds of a MeTA-LoRA round with all tasks in one forward, of the same round with PEFT task after task)]: T = 4, K = 10, AdamW."""
    pytest.importorskip("peft", reason="peft is not installed; .ci/run installs it for this test")
    sides = [side(name, "cpu", rows, length) for side in (bench.lora_ours, bench.lora_peft)]
    return [tuple(bench.timed(step) for step in sides) for _ in range(repeats + 1)][1:]


@pytest.mark.parametrize("length,rows,least", [(96, 4, 0.9), (32, 1, 1.3)])
def test_round_against_peft(length, rows, least):
    """The measured figures are in the README (targets 1.2 and 2); the bounds here only catch a regression on a noisy machine."""
    ratios = sorted(b / a for a, b in lora_rounds("tiny", length, rows, 5))
    print(f"\n{rows} x {length} tokens a task: PEFT task after task / one forward for all: median {ratios[2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    assert ratios[2] > least


# ---------------------------------------------------------------------------------------------------------------------
# Any Hugging Face causal language model


def random_config(family):
    import transformers as t

    common = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
              "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    grouped = common | {"num_key_value_heads": 1}
    return {"llama": lambda: t.LlamaConfig(**grouped), "qwen2": lambda: t.Qwen2Config(**grouped), "qwen3": lambda: t.Qwen3Config(**grouped, head_dim=16),
            "gemma3": lambda: t.Gemma3TextConfig(**grouped, head_dim=16, sliding_window=16), "mistral": lambda: t.MistralConfig(**grouped, sliding_window=16),
            "phi3": lambda: t.Phi3Config(**grouped), "olmo2": lambda: t.Olmo2Config(**grouped), "gpt_neox": lambda: t.GPTNeoXConfig(**common)}[family]()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "olmo2", "gpt_neox"])
def test_any_causal_lm(family, process_group, tmp_path):
    """One meta-step with FSDP2, a lower loss on the same meta-batch, and a saved model that loads with the same logits."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = random_config(family)
    source = AutoModelForCausalLM.from_config(config)
    model = models.skeleton(config)
    blocks = models.layers_to_shard(model)
    assert len(blocks) == 2
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard"))
    for block in blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    models.materialize(model, source, torch.device("cpu"))
    ids = torch.randint(3, 96, (2, 20))
    torch.testing.assert_close(model(ids).logits, source(ids).logits)
    episodes, tokens = random_episodes(2, 4, 4, vocab=96)
    learner = fomaml.Learner(model.train(), fomaml.Buffers(model, 0.05), fomaml.World(torch.device("cpu"), mesh=mesh), 0, tokens)
    optimizer = torch.optim.AdamW(learner.buffers.params, lr=3e-3, fused=True)
    losses = []
    for _ in range(3):
        losses.append(fomaml.meta_gradient(learner, episodes, "fomaml", 2, 2)[:, 1].mean().item())
        fomaml.set_gradients(learner.buffers)
        assert torch.isfinite(fomaml.full(torch.nn.utils.clip_grad_norm_(learner.buffers.params, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    _, tokenizer = models.load_config("tiny")
    models.save_pretrained(tmp_path, model, tokenizer, models.full_weights(model, torch.float32), torch.float32)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)

    policy = amft.Policy(models.skeleton(config), False)  # and a step of AMFT's loss
    for block in [*models.layers_to_shard(policy.lm), policy]:
        fully_shard(block, mesh=mesh["shard"])
    models.materialize(policy, amft.Policy(source, False), torch.device("cpu"))
    world = amft.World(torch.device("cpu"), mesh=mesh)
    models.check_head(policy, world)
    optimizer = torch.optim.AdamW([{"params": list(policy.parameters()), "lr": 1e-2, "peak": 1e-2}])
    args = amft.with_defaults(amft.Args(method="fixed", micro_batch=4))
    learner, batch = amft.Learner(args, policy.train(), optimizer, world, 0), random_rows(6, vocab=96)
    amft.set_weights(args, world, batch, batch)
    losses = []
    for _ in range(3):
        losses.append(learner.backward(batch, "sft")["sft"])
        gradient = learner.flat()
        learner.move_gradient((gradient, 1.0))
        assert learner.take_step(gradient, 1.0)[1]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
def test_vision_models(family):
    """Prompts with pictures of different lengths in one batch: the policy's log-probabilities of the sampled tokens are the sampler's."""
    import transformers as t

    text = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if family == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        config = t.Qwen2_5_VLConfig(text_config=text | {"num_hidden_layers": 2, "rope_parameters": rope}, vision_config=vision, image_token_id=190, vision_start_token_id=192, tie_word_embeddings=True)
        ids = [5, 6, 192, 190, 190, 190, 190, 193, 7]
        make = lambda n: {"pixel_values": torch.randn(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]]),  # noqa: E731
                          "mm_token_type_ids": torch.tensor([[0] * n + [int(x == 190) for x in ids]])}
    else:
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 2,
                  "vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
        config = t.MllamaConfig(text_config=text | {"num_hidden_layers": 3, "cross_attention_layers": [1]}, vision_config=vision, image_token_index=200)
        ids = [200, 5, 6, 7, 1]
        make = lambda n: {"pixel_values": torch.randn(1, 1, 2, 3, 28, 28), "aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1, 0]]]),  # noqa: E731
                          "cross_attention_mask": torch.tensor([[[[0, 0]]] * n + [[[1, 0]]] * len(ids)])}
    lm = models.auto_class(config).from_config(config).eval()
    for n, p in lm.named_parameters():
        if n.endswith("gate"):
            torch.nn.init.ones_(p)  # Mllama's pictures count for nothing at initialisation
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    prompts = [models.Prompt([9] * n + ids, make(n)) for n in (0, 3)]
    samples = models.sample_with_pictures(lm, tokenizer, prompts, 2, 6, 1.0, frozenset([2]), 8, [1] * 4)
    turns = [models.Turn(prompts[i // 2].ids, s.ids, s.logprobs, s.finished, "", 1.0, prompts[i // 2].inputs) for i, s in enumerate(samples)]
    policy = models.Policy(lm, False)
    world = amft.World(torch.device("cpu"))
    (batch,) = amft.batches([amft.Row(t, [0.0] * len(t.ids)) for t in turns], 0, 4, world, 1)
    logprobs, _, _ = policy(batch["ids"], batch["mask"], **batch["inputs"])
    torch.testing.assert_close(logprobs[batch["mask"]], batch["old"][batch["mask"]], rtol=0, atol=1e-4)
    changed = models.Prompt(prompts[0].ids, prompts[0].inputs | {"pixel_values": -prompts[0].inputs["pixel_values"]})
    other = models.sample_with_pictures(lm, tokenizer, [changed], 2, 6, 1.0, frozenset([2]), 8, [1] * 2)
    assert other[0].logprobs[0] != samples[0].logprobs[0]


@pytest.fixture(scope="module")
def tiny_and_prompts():
    _, tokenizer = models.load_config("tiny")
    chat = data.template(tokenizer)
    examples = [e for rows in data.embedded_examples(3, 1, "test", "heldout").values() for e in rows]
    return models.load_weights("tiny").eval(), tokenizer, chat.stop, tokenizer([chat.before + e.prompt + chat.after for e in examples], add_special_tokens=False)["input_ids"]


def test_greedy_equals_generate(tiny_and_prompts):
    """Our sampler at temperature 0 and transformers' generate give the same tokens, prompts of different lengths in one batch."""
    model, tokenizer, stop, prompts = tiny_and_prompts
    ours = models.sample(model, tokenizer, prompts, max_new_tokens=40, temperature=0, stop=stop, batch_size=8)
    for prompt, got in zip(prompts, ours, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert got.ids == expected and got.finished == (expected[-1] in stop)


def test_sampler(tiny_and_prompts):
    """Log-probabilities equal a fresh forward's; the same tokens for a seed however the prompts are batched; the right distribution."""
    model, tokenizer, stop, prompts = tiny_and_prompts
    draw = lambda seed, **kw: models.sample(model, tokenizer, prompts[:6], 4, 24, generator=torch.Generator().manual_seed(seed), stop=stop, **kw)  # noqa: E731
    one, other = draw(1, batch_size=8), draw(1, batch_size=64)
    assert sum(a.ids == b.ids for a, b in zip(one, other, strict=True)) >= 23 and [a.ids for a in one] != [b.ids for b in draw(2)]
    for i, s in enumerate(one):
        prompt = prompts[i // 4]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + s.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(s.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, rtol=0, atol=1e-4)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, 4)
    u = models._uniform(torch.arange(40_000), 5)
    assert abs(u.mean().item() - 0.5) < 0.01 and abs(torch.corrcoef(torch.stack([u, models._uniform(torch.arange(40_000), 6)]))[0, 1]) < 0.02
    wide = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 3  # several blocks: the inverse of the running sum
    for x in torch.linspace(0, 0.9999, 50):
        token, logprob = models._draw(wide, x.double().expand(3), 1.0, 1.0)
        cumulative = wide.double().softmax(-1).cumsum(-1)
        assert all(cumulative[i, t] > x - 1e-5 and (t == 0 or cumulative[i, t - 1] < x + 1e-5) for i, t in enumerate(token))
        torch.testing.assert_close(logprob, wide.log_softmax(-1).gather(1, token[:, None]).squeeze(1))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        p = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            p = torch.tensor([0.0, p[1], p[2], 0.0]) / (p[1] + p[2])  # 0.24 + 0.64 reach 0.8
        share = torch.bincount(models._draw(logits, u, temperature, top_p)[0], minlength=4) / 40_000
        torch.testing.assert_close(share, p, rtol=0, atol=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# AMFT: losses by hand, the batch against a loop over rows, the derivative of mu against finite differences


def amft_learner(model, optimizer=None, **options):
    args = amft.with_defaults(amft.Args(**{"micro_batch": 3, "samples": 4} | options))
    policy = amft.Policy(model, args.advantage == "gae").to(next(model.parameters()).dtype).train()
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard"))
    return args, amft.Learner(args, policy, optimizer or torch.optim.AdamW(policy.parameters(), lr=1e-2), amft.World(torch.device("cpu"), mesh=mesh), 0)


def random_rows(count, seed=0, vocab=64, demonstration=False):
    """Rows with random tokens, lengths, advantages; old log-probabilities near those of a uniform policy."""
    rng, out = random.Random(seed), []
    for _ in range(count):
        ids = [rng.randrange(vocab) for _ in range(rng.randint(2, 20))]
        old = [0.0 if demonstration else -math.log(vocab) + rng.uniform(-0.5, 0.5) for _ in ids]
        turn = amft.Turn([rng.randrange(vocab) for _ in range(rng.randint(2, 9))], ids, old, rng.random() < 0.8, "", float(rng.random() < 0.5))
        a = rng.uniform(-1, 1)
        out.append(amft.Row(turn, [a] * len(ids), demonstration=demonstration, right=turn.reward > 0, returns=[rng.uniform(0, 1) for _ in ids]))
    return out


def test_amft_losses_by_hand():
    """Each loss and its derivative by log pi, on numbers worked out apart."""
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2), math.log(0.9)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(0.4), math.log(0.4), math.log(0.9)]], dtype=torch.float64)  # ratios 1.25, 0.5, 1

    def both(loss):
        return loss.tolist()[0], torch.autograd.grad(loss.sum(), logprobs)[0].tolist()[0]

    close = lambda got, value, slope: [pytest.approx(x, abs=1e-12) for x in (value, slope)] == list(got)  # noqa: E731
    one = torch.ones_like(old)
    # PPO: A = 1: 1.25 is cut to 1.2, no gradient; 0.5 stays. A = -1: 1.25 stays; 0.5 is cut to 0.8, no gradient.
    assert close(both(amft.ppo_loss(logprobs, old, one, 0.2)), [-1.2, -0.5, -1.0], [0.0, -0.5, -1.0])
    assert close(both(amft.ppo_loss(logprobs, old, -one, 0.2)), [1.25, 0.8, 1.0], [1.25, 0.0, 1.0])
    # LUFFY: p / (p + 0.1) with derivative p * 0.1 / (p + 0.1)^2 by log p; own tokens by their ratio, unclipped
    demo = torch.tensor([[True]])
    p = [0.5, 0.2, 0.9]
    assert close(both(amft.luffy_loss(logprobs, torch.zeros_like(old), 2 * one, demo, 0.1)), [-2 * x / (x + 0.1) for x in p], [-2 * x * 0.1 / (x + 0.1) ** 2 for x in p])
    assert close(both(amft.luffy_loss(logprobs, old, 2 * one, ~demo, 0.1)), [-2.5, -1.0, -2.0], [-2.5, -1.0, -2.0])
    # SRFT, H = 0.7: demonstrations 0.5 e^-H (-log p) + min(p A, clip(p, 0.8, 1.2) A) with A = 1: p itself below 1.2; own 0.1 e^H (-log p) or + log p
    H, e = torch.tensor([[0.7]], dtype=torch.float64), math.exp(0.7)
    srft = lambda d, r: both(amft.srft_loss(logprobs, torch.zeros_like(old) if d else old, one, torch.tensor([[d]]), torch.tensor([[r]]), H, 0.2))  # noqa: E731
    assert close(srft(True, True), [-0.5 / e * math.log(x) - x for x in p], [-0.5 / e - x for x in p])
    assert close(srft(False, True), [-0.1 * e * math.log(x) for x in p], [-0.1 * e] * 3)
    assert close(srft(False, False), [math.log(x) for x in p], [1.0] * 3)
    # SFT and CHORD-phi: p (1 - p) is a constant to the gradient
    assert close(both(amft.sft_loss(logprobs)), [-math.log(x) for x in p], [-1.0] * 3)
    assert close(both(amft.sft_loss(logprobs, phi=True)), [-x * (1 - x) * math.log(x) for x in p], [-x * (1 - x) for x in p])
    # advantages: (1, 0, 0, 1): mean 1/2, std with n - 1 = sqrt(1/3)
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert amft.group_advantages([1.0, 0, 0, 1], "grpo") == pytest.approx([unit, -unit, -unit, unit]) and amft.group_advantages([1.0] * 4, "grpo") == [0] * 4
    assert amft.group_advantages([3.0, 0, 0], "mean") == [2, -1, -1] and amft.group_advantages([3.0, 0, 0], "leave_one_out") == pytest.approx([3, -1.5, -1.5])
    # GAE, V = (0.5, 0.2, 0.4), reward 1, lambda 0.5: deltas -0.3, 0.2, 0.6 -> 0.6, 0.2 + 0.3, -0.3 + 0.25
    assert amft.gae([0.5, 0.2, 0.4], 1.0, 0.5) == pytest.approx([-0.05, 0.5, 0.6]) and amft.gae([0.5, 0.2], 1.0, 1.0) == pytest.approx([0.5, 0.8])
    episode = amft.Episode([amft.Turn([], [], [], True, "", r) for r in (-1.0, -2.0, 5.0)])
    assert episode.returns(1.0) == [2, 3, 5] and episode.returns(0.5) == [-0.75, 0.5, 5]


@pytest.mark.parametrize("method,options", [("rl", {}), ("rl", {"loss_aggregation": "sequence", "mask_truncated": True}), ("rl", {"advantage": "gae", "entropy_coefficient": 0.05}),
                                            ("luffy", {}), ("srft", {}), ("hpt", {"hpt_sft": 0.3}), ("chord", {"chord_phi": True})], ids=str)
def test_amft_batch_equals_rows(method, options, process_group):
    """Loss and gradient of a padded batch in micro-batches, by each method's normalisation, equal a plain loop over unpadded rows; rows
    with advantage 0 too, which are not sent through backward."""
    model = small_llama()
    args, learner = amft_learner(model, method=method, **options)
    own = random_rows(7, 1)
    for r in own[2:5]:
        r.advantages = [0.0] * len(r.turn.ids)
    shown = random_rows(3, 2, demonstration=True)
    rl, sft = (own + shown, []) if method in ("luffy", "srft") else (own, shown)
    amft.set_weights(args, learner.world, rl, sft)
    sums = learner.backward(rl, "rl+aux" if options.get("advantage") or options.get("entropy_coefficient") else "rl", 0.6)
    assert sums["tokens"] == sum(len(r.turn.ids) for r in own if r.weight)
    if sft:
        learner.backward(sft, "sft", 0.4)
    got = {n: p.grad.clone() for n, p in learner.policy.named_parameters()}
    learner.policy.zero_grad()

    kept = [r for r in rl if r.turn.finished or not args.mask_truncated]
    tokens = lambda rows: sum(len(r.turn.ids) for r in rows)  # noqa: E731
    value = torch.zeros((), dtype=torch.float64)
    for r in rl + sft:
        ids, n = torch.tensor([r.turn.prompt + r.turn.ids]), len(r.turn.prompt)
        out = model(ids, output_hidden_states=True, use_cache=False)
        full_logprobs = out.logits[0, n - 1 : -1].log_softmax(-1)
        logp = full_logprobs.gather(1, ids[0, n:, None]).squeeze(1)
        entropy = -(full_logprobs.exp() * full_logprobs).sum(-1)
        old, a = torch.tensor(r.turn.old_logprobs, dtype=torch.float64), r.advantages[0]
        ratio = (logp - old).exp()
        clipped = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        if r in sft:
            if method == "hpt":
                value = value + 0.4 * 0.3 / args.prompts_per_step * -logp.mean()
            else:
                weight = (logp.exp() * (1 - logp.exp())).detach() if method == "chord" else 1
                value = value + 0.4 * (-weight * logp).sum() / tokens(sft)
        elif r in kept:
            if method == "luffy":
                f = logp.exp() / (logp.exp() + 0.1) if r.demonstration else ratio
                value = value + 0.6 * -(f * a).sum() / len(rl) / args.max_new_tokens
            elif method == "hpt":
                value = value + 0.6 * -(ratio * a).sum() / (args.prompts_per_step * args.samples * args.max_new_tokens)
            elif method == "srft":
                H = entropy.mean().detach()
                term = 0.5 * torch.exp(-H) * -logp + clipped if r.demonstration else 0.1 * torch.exp(H) * -logp if r.right else logp
                value = value + 0.6 * term.sum() / tokens(shown if r.demonstration else own)
            elif args.loss_aggregation == "sequence":
                value = value + 0.6 * clipped.mean() / len(kept)
            else:
                value = value + 0.6 * clipped.sum() / tokens(kept)
            if args.advantage == "gae":
                v = learner.policy.value(out.hidden_states[-1][0, n - 1 : -1]).squeeze(-1)
                value = value + args.value_coefficient * 0.5 * (v - torch.tensor(r.returns, dtype=torch.float64)).square().sum() / tokens(kept)
                value = value - 0.05 * entropy.sum() / tokens(kept)
    value.backward()
    for n, p in learner.policy.named_parameters():
        torch.testing.assert_close(got[n], p.grad, rtol=1e-5, atol=1e-7, msg=n)  # the batch holds weights in float32


@pytest.mark.parametrize("preconditioner,clip", [("adam", 1e9), ("adam", 0.5), ("none", 1e9)])
def test_meta_gradient_against_finite_differences(preconditioner, clip, process_group):
    """< grad U(theta_t), d theta_t / d mu > equals the central difference of U(theta_t(mu)) to 1e-4, U being an enumerated expectation."""
    model = small_llama(vocab_size=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    args, learner = amft_learner(model, optimizer, clip=clip)
    generator = torch.Generator().manual_seed(3)
    noise = lambda size: [size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in learner.params]  # noqa: E731
    for _ in range(11):
        learner.take_step(noise(0.3), 1.0)
    g_rl, g_sft, g_aux = noise(0.3), noise(0.3), noise(0.1)
    rewards = torch.randn(2, 49, generator=generator, dtype=torch.float64)
    responses = torch.cartesian_prod(torch.arange(7), torch.arange(7))  # every response of two tokens

    def utility():
        """E[R] over two prompts, all 49 responses enumerated."""
        total = 0.0
        for prompt, reward in zip(([1, 2, 3], [4, 5]), rewards, strict=True):
            ids = torch.cat([torch.tensor(prompt).expand(49, -1), responses], 1)
            logprobs = model(ids, use_cache=False).logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, responses[..., None]).sum((1, 2))
            total = total + (logprobs.exp() * reward).sum() / 2
        return total

    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def step(mu):
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        G = [(1 - mu) * r + mu * s + a for r, s, a in zip(g_rl, g_sft, g_aux, strict=True)]
        if preconditioner == "none":
            with torch.no_grad():
                for p, g in zip(learner.params, G, strict=True):
                    p.sub_(g, alpha=3e-3)
            return G, math.sqrt(learner.dot(G, G))
        return G, learner.take_step(G, 1.0)[0]

    G, norm = step(0.4)
    assert (norm > clip) == (clip < 1)
    D = [s - r for r, s in zip(g_rl, g_sft, strict=True)]
    amft.step_derivative(optimizer, learner.params, G, D, norm, learner.dot(G, D), clip, preconditioner)
    ours = learner.dot(torch.autograd.grad(utility(), learner.params), D)
    h, values = 1e-4, []
    for mu in (0.4 + h, 0.4 - h):
        step(mu)
        with torch.no_grad():
            values.append(utility().item())
    assert ours == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4) and abs(ours) > 1e-6


def test_a_step_that_does_not_depend_on_mu(process_group):
    """A clipped step along mu g_SFT is the same for every mu: no meta-gradient is taken, as its rounding would become the scale of the next."""
    model = small_llama()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 1e-3, "peak": 1e-3}])
    _, learner = amft_learner(model, optimizer, clip=0.5)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    sft, rl = ([torch.randn_like(p) for p in learner.params] for _ in range(2))

    def after(mu, part, clip):
        learner.args.clip = clip
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        G = [mu * s + (1 - mu) * part * r for s, r in zip(sft, rl, strict=True)]
        norm, _ = learner.take_step(G, 1.0)
        D = [s - part * r for s, r in zip(sft, rl, strict=True)]
        return amft.depends_on_mu(norm, learner.dot(G, D), learner.dot(D, D), clip, "adam"), torch.cat([p.detach().flatten().clone() for p in learner.params])

    for part, clip, depends in ((0.0, 0.5, False), (0.0, 1e9, True), (1e-3, 0.5, True)):
        (first, a), (second, b) = after(0.3, part, clip), after(0.6, part, clip)
        assert first == second == depends
        if not depends:
            assert (a - b).abs().max() < 1e-9
        elif part:
            assert (a - b).abs().max() > 1e-7
    assert not amft.depends_on_mu(0.0, 0.0, 0.0, 0.5, "adam")


def test_utility_gradient_is_unbiased(process_group):
    """Over all pairs of samples of a prompt, weighted by their probability, the estimate of grad_mu U is the exact inner product."""
    model = small_llama(vocab_size=5)
    args, learner = amft_learner(model, samples=2)
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in learner.params]
    prompt, rewards = [1, 2, 3], [0.0, 1.0, 0.5, -1.0, 2.0]
    p = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].softmax(-1)
    exact = learner.dot(torch.autograd.grad((p * torch.tensor(rewards, dtype=torch.float64)).sum(), learner.params), direction)
    expected = 0.0
    for a in range(5):
        for b in range(5):
            group = [amft.Episode([amft.Turn(prompt, [y], [0.0], True, "", rewards[y])]) for y in (a, b)]
            expected += (p[a] * p[b]).item() * learner.utility_gradient([group, group], direction)[0]  # the two halves are alike here
    assert expected == pytest.approx(exact, rel=1e-6)


def test_controller():
    """Both forms of eq. (6), both signs, the schedules of the other methods."""
    printed = amft.Controller(amft.Args(mu_update="printed", mu_init=0.5))
    assert printed.update(1, None, 0.3, 0.5)["mu_change/entropy"] == pytest.approx(5e-4 * 0.2)
    printed.update(20, 0.1, 0.5, 0.5)
    assert printed.mu == pytest.approx(0.5 + 5e-4 * 0.2 + 1e-4 * 0.1)
    text = amft.Controller(amft.Args(mu_update="printed", entropy_sign="text"))
    assert text.update(1, None, 0.3, 0.5)["mu_change/entropy"] == pytest.approx(-5e-4 * 0.2)
    ours = amft.Controller(amft.Args(mu_every=5, no_entropy_term=True))
    changes = [ours.update(5 * k, g, 0.1, 0.5)["mu_change/meta_gradient"] for k, g in enumerate((3.0, 0.0, -4.0, 5.0, -100.0), 1)]
    assert changes == pytest.approx([0, 0, 0, 0.05 * 5 / math.sqrt(12.5), -0.15]) and ours.mu == pytest.approx(0.5 + sum(changes))
    entropy = amft.Controller(amft.Args(mu_every=5, mu_init=0.94))
    assert entropy.update(4, None, 0.1, 0.5)["mu_change/entropy"] == 0 and entropy.update(5, None, 0.1, 0.7)["mu_change/entropy"] == pytest.approx(0.03)
    assert entropy.mu == 0.95
    at = lambda step, **options: amft.mu_of_step(amft.with_defaults(amft.Args(**options)), step, amft.Controller(amft.Args(**options)))  # noqa: E731
    assert [at(s, method="sft_then_rl", steps=10) for s in (0, 4, 5)] == [1, 1, 0] and at(4) == 1 and at(5) == 0.5 and at(3, method="rl") == 0
    assert at(0, method="chord") == pytest.approx(0.9) and at(100, method="chord") == pytest.approx(0.475) and at(500, method="chord") == pytest.approx(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The games


def test_general_points_solver():
    """The known numbers of solvable hands; every solution evaluates to 24 with each number used once; a hand with only fractions."""
    hands = {n: list(itertools.combinations_with_replacement(range(1, n + 1), 4)) for n in (10, 13)}
    assert {n: (len(h), sum(games.solvable(x) for x in h)) for n, h in hands.items()} == {10: (715, 566), 13: (1820, 1362)}
    for hand in hands[13][::37]:
        found = games.solutions(hand, 24)
        assert bool(found) == games.solvable(hand)
        for formula in found:
            value, used = games.evaluate(formula)
            # Python's own arithmetic on Fractions, on a text of our own making
            assert value == 24 == eval(re.sub(r"(\d+)", r"Fraction(\1)", formula)) and sorted(used) == list(hand)
    assert "8/(3-8/3)" in games.solutions((3, 3, 8, 8), 24) and games.evaluate(" -( 2 - 3) *24 ") == (24, [2, 3, 24])


def play_expert(game, seed):
    state, done, results = game.reset(seed), False, []
    while not done:
        results.append(game.step(state, game.expert(state)))
        done = results[-1].done
    return results


GAMES = [games.GeneralPoints(), games.GeneralPoints("11_12_13"), games.GeneralPoints(suits="red", vision=True), games.GeneralPoints(compact=True), games.VIRL(),
         games.VIRL("relative"), games.VIRL("relative", compact=True, turns=(2, 3), forward_points=1), games.VIRL(style=1, vision=True)]


def test_the_expert_wins():
    """1,000 of 1,000 episodes of each game and variant; every step the best reward; seeds give the same episode."""
    for game in GAMES:
        for seed in range(1000):
            results = play_expert(game, seed)
            assert results[-1].won and all(r.reward == (5 if isinstance(game, games.GeneralPoints) else 1) for r in results)
        assert game.reset(7) == game.reset(7) != game.reset(8)
    hands = [games.GeneralPoints("11_12_13").reset(i) for i in range(200)]
    assert all(any(r in "JQK" for r, _ in h.cards) for h in hands) and all(s in ("spades", "clubs") for h in hands for _, s in h.cards)
    walks = [games.VIRL().reset(i) for i in range(200)]
    assert all(not w.positions[0].intersection and not w.positions[-1].intersection and w.positions[-1].action == "stop()" for w in walks)
    assert len({games.VIRL(split=s).reset(i).instructions[0] + str(games.VIRL(split=s).reset(i).positions) for s in ("train", "test") for i in range(100)}) == 200


def test_general_points_rewards():
    """Each reward and message of the specification, reached by a hand-written answer."""
    def judged(answer, vision=False, cards="4 7 8 8"):
        game = games.GeneralPoints(vision=vision)
        hand = games.Hand(0, [(c, "clubs") for c in cards.split()], [game._value(c) for c in cards.split()])
        return game.step(hand, answer if answer.startswith("{") or " " in answer else json.dumps({"cards": cards.split(), "number": [], "formula": answer}))

    for formula, reward, message in (("(7-8/8)*4=24", 5, "Right."), (" (7 - 8/8) * 4", 5, "Right."), ("-(8/8-7)*4=24", 5, "Right."), ("7+8+8+4=24", -1, "gives 27"), ("(7-9/9)*4=24", -4, "uses a number"),
                                     ("(7-8/8)*4+8=24", -2, "uses a number"), ("4*7=24", -2, "leaves a number out"), ("(7-8/8)*3=24", -4, "uses a number"), ("8/(8-8)*7+4", -3, "division by zero"), ("((7-8/8)*4=24", -3, "illegal"),
                                     ("7**8", -3, "illegal"), ("7-8/8)*4", -3, "illegal"), ("", -3, "illegal"), ("24=(7-8/8)*4", -4, "uses a number"), ("7 - 8\\u00b2", -3, "illegal")):
        result = judged(json.dumps({"formula": formula}))
        assert (result.reward, result.won) == (reward, reward == 5) and message in result.message, (formula, result)
    assert judged("no formula here").reward == -3 and judged('The answer: "formula": "(7-8/8)*4=24" }').won and judged('{"formula": 24}').reward == -3
    assert judged('{"formula": "8/(3-8/3)=24"}', cards="3 3 8 8").won and judged('{"cards": ["10"], "formula": "(10-4)*4/A"}', cards="Q 4 4 A").reward == -3
    assert judged('{"formula": "(10-4)*4/1"}', cards="Q 4 4 A").won
    good = '{"cards": ["8", "7", "4", "8"], "number": [], "formula": "(7-8/8)*4=24"}'
    assert judged(good, vision=True).won and judged(good.replace('"8", "7"', '"9", "7"'), vision=True).reward == -1.5 and judged("garbage !", vision=True).reward == -1.5
    game = games.GeneralPoints()
    hand = game.reset(0)
    results = [game.step(hand, "{}") for _ in range(5)]
    assert [r.done for r in results] == [False] * 4 + [True] and not any(r.won for r in results) and len(game.prompt(hand)) == 11
    assert game.prompt(hand)[2] == {"role": "user", "content": "There is no formula in your answer. Try again."}


def test_virl_rewards():
    """Rewards, the rails, the two attempts, and the direction words by hand."""
    assert [games.turn(0, x) for x in (45, 46, 90, 180, 315, 270, 225)] == ["slightly right", "right", "right", "right", "slightly left", "left", "left"]
    assert games.turn(350, 30) == "slightly right" and games.wrap(-180) == 180 and games.bearing(-45) == "left front" and games.compass(181) == "south"
    route = games.Route(90, (0, 270), ((("Old Bank", 90),), (("Red Cafe", 180),)), (50, 50))
    game = games.VIRL(routes=(route,), forward_points=0)
    walk = game.reset(0)
    assert walk.instructions == ["First, turn left to face north.", "Move forward until you reach next intersection where Old Bank is on your right.",
                                 "Turn left to face west.", "Move forward until you reach destination where Red Cafe is on your left."]
    assert [(games.observation(p), p.instruction, p.action) for p in walk.positions] == [
        ("No landmarks nearby; no intersection", 0, "turn_direction(north)"), ("No landmarks nearby; no intersection", 1, "forward()"),
        ("Old Bank on your right; you are at an intersection", 2, "turn_direction(west)"), ("Old Bank on your behind; you are at an intersection", 3, "forward()"),
        ("Red Cafe on your left; no intersection", 3, "stop()")]
    relative = games.VIRL("relative", routes=(route,), forward_points=0).reset(0)
    assert [p.action for p in relative.positions] == ["turn_direction(left)", "forward()", "turn_direction(left)", "forward()", "stop()"]
    say = lambda action, see=None, follow=None: json.dumps({k: v for k, v in (("current observation", see), ("current instruction", follow), ("action", action)) if v})  # noqa: E731
    right_see, right_follow = "Old Bank on your right; you are at an intersection", "Turn left to face west."
    for answer, reward, message in ((say("forward()"), -1, "forward() is not the right action"), (say("forward()", right_see, right_follow), -1, "not the right"),
                                    (say("forward()", "No landmarks nearby; you are at an intersection", right_follow), -1.5, "observation"), (say("forward()", right_see.replace("right", "left"), right_follow), -1.5, "observation"),
                                    (say("forward()", "Old Bank on your right; no intersection", right_follow), -1.5, "observation"), (say("forward()", right_see, walk.instructions[1]), -1.75, "Another instruction"),
                                    (say("forward()", "Red Cafe", walk.instructions[1]), -1.75, "Another instruction"), ("garbage", -1, "no action"), (say("turn_direction(west)", "nonsense", "nonsense"), 1, "Right."),
                                    (say(" Turn_Direction(west) "), 1, "Right.")):
        walk = game.reset(0)
        for action in ("turn_direction(north)", "forward()"):
            assert game.step(walk, say(action)).reward == 1
        result = game.step(walk, answer)
        assert result.reward == reward and message in result.message and not result.done, (answer, result)
        if reward < 0:
            assert len(game.prompt(walk)) == 3 and walk.place == 2
            assert game.step(walk, say("turn_direction(west)")).reward == 1 and len(game.prompt(walk)) == 1  # the failed attempt is forgotten
            assert "Old Bank on your right; you are at an intersection -> turn_direction(west)" in game.prompt(walk)[0]["content"]
    walk = game.reset(0)
    results = [game.step(walk, say("stop()")) for _ in range(2)]
    assert [r.done for r in results] == [False, True] and not results[1].won and game.step(walk, say("forward()")).done


@pytest.mark.parametrize("game", [games.GeneralPoints(), games.VIRL()], ids=["general_points", "virl"])
def test_hostile_game_outputs(game):
    """20,000 random and mutated answers and the checker's hostile strings: a reward, a message, no exception, under 20 ms."""
    rng = random.Random(0)
    alphabet = '{}[]"\'\\:,.0123456789+-*/()= \n\tabcAKQJ\u00e9\u4e2d\x00'
    hostile = []
    if SHARED.is_dir():
        for line in (SHARED / "checker" / "hostile.jsonl").read_text().splitlines():
            hostile += [str(v) for v in json.loads(line).values()]
    hostile += ["[" * 100_000, "{" * 100_000, '{"formula": "' + "(" * 100_000, '{"formula": "' + "9" * 5000 + '"}', '{"number": ' + "9" * 7000 + "}", "9" * 100_000, '{"action": ' * 9000, '"' * 100_000,
                '{"formula": "' + "1+" * 90 + '1"}', '{"formula": "' + "(" * 30 + "1" + ")" * 30 + '"}', '{"formula": "9999/1*' + "9999*" * 40 + '1"}']
    worst = 0.0
    for i in range(20_000 + len(hostile)):
        state = game.reset(i % 50)
        expert = game.expert(state)
        if i < len(hostile):
            text = hostile[i]
        elif i % 2:
            text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 80)))
        else:
            chars = list(expert)
            for _ in range(rng.randint(1, 6)):
                chars[rng.randrange(len(chars))] = rng.choice(alphabet)
            text = "".join(chars)
        start = time.perf_counter()
        result = game.step(state, text)
        seconds = time.perf_counter() - start
        worst = max(worst, seconds if seconds < 0.02 else min(seconds, bench.timed(lambda: game.step(game.reset(i % 50), text))))
        assert isinstance(result.reward, float) and isinstance(result.message, str) and len(result.message) < 300
    assert worst < 0.02


def test_route_files(tmp_path):
    """A small file in the original's format; the expert walks it; wrong files are one clear line."""
    route = {"start_place": {"relocated_geocode": [40.0, -74.0]}, "init_heading": 0, "dest_place": {},
             "milestone_info": {"0": {"landmarks": [{"name": "Deli", "bearing": "right"}], "to_next_intersection_heading": "2 (north)"},
                                "1": {"landmarks": ["Bank of Us is on your left"], "to_next_intersection_heading": "91 (east)"},
                                "2": {"landmarks": [], "to_next_intersection_heading": ""}},
             "route_results": {"geocode_list": [[40.0, -74.0], [40.001, -74.0], [40.001, -73.998]]}, "landmark_list": []}
    (tmp_path / "r.json").write_text(json.dumps([[route, {**route, "init_heading": 177}], 2]))
    routes = games.load_routes(str(tmp_path / "r.json"))
    assert [round(x) for x in routes[0].lengths] == [111, 171] and routes[1].initial_heading == 177 and math.isnan(routes[0].initial_heading)
    for actions in ("absolute", "relative"):
        game = games.VIRL(actions, routes=tuple(routes))
        assert all(play_expert(game, s)[-1].won for s in range(20))
        walk = game.reset(1)
        assert walk.instructions[0] == "First, turn left to face north." and walk.instructions[1] == "Move forward until you reach next intersection where Deli is on your right."
        assert walk.instructions[3] == "Move forward until you reach destination where Bank of Us is on your left."
    assert len({len(games.VIRL(routes=tuple(routes)).reset(s).positions) for s in range(0, 40, 2)}) > 3  # forward points are drawn at reset
    for bad in ("{", "[[], 0]", '[[{"init_heading": 1}], 1]', '{"a": 1}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(data.DataError, match="route"):
            games.load_routes(str(tmp_path / "bad.json"))


def test_game_pictures():
    """Pictures differ where cards, suits, landmarks or style differ, and are drawn at any size."""
    cards, red = games.GeneralPoints(vision=True), games.GeneralPoints(vision=True, suits="red")
    a, b = cards.reset(1), cards.reset(2)
    assert cards.render(a).size == (256, 128) and cards.render(a, 512).size == (512, 256)
    assert len({cards.render(a).tobytes(), cards.render(b).tobytes(), red.render(red.reset(1)).tobytes()}) == 3
    assert cards.prompt(a)[0]["content"][0]["type"] == "image"
    walk, other = games.VIRL(vision=True).reset(3), games.VIRL(vision=True, style=1)
    assert games.VIRL().render(walk).size == (256, 256) and games.VIRL().render(walk).tobytes() != other.render(other.reset(3)).tobytes()
    route = lambda where: games.Route(0, (0, 90), ((("Old Bank", where),), ()), (50, 50))  # noqa: E731
    views = []
    for where in range(0, 360, 45):
        game = games.VIRL(routes=(route(where),), forward_points=0)
        state = game.reset(0)
        for _ in range(2):
            game.step(state, game.expert(state))
        views.append(game.render(state).tobytes())
    assert len(set(views)) == 8  # each bearing is another picture


# ---------------------------------------------------------------------------------------------------------------------
# Cost: time against the floor, buffers of the parameters' size


def test_cost_against_the_floor(process_group):
    """A meta-step against its T x (K+1) bare forward/backward passes on the same batches, alternating in one run."""
    config, tokenizer = models.load_config("tiny")
    bare = models.load_weights("tiny").train()
    world = fomaml.World(torch.device("cpu"), mesh=dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard")))
    model = fomaml.build(fomaml.Args(), config, world)
    tasks = [t for t in data.load_tasks("embedded") if not t.heldout]
    tokens, _ = data.encode(tokenizer, [e for t in tasks for part in (t.support, t.query) for e in part], 2048)
    args = fomaml.Args()
    learner = fomaml.Learner(model, fomaml.Buffers(model, args.inner_lr), world, 0, tokens)
    optimizer = torch.optim.AdamW(learner.buffers.params, lr=1e-4, fused=True)
    ratios = []
    for step in range(9):
        episodes = [data.sample_episode(tasks, 0, step, i, 0, 4, 20, 8) for i in range(4)]
        start = time.perf_counter()
        fomaml.meta_gradient(learner, episodes, "fomaml", 4, 4)
        fomaml.set_gradients(learner.buffers)
        torch.nn.utils.clip_grad_norm_(learner.buffers.params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ours = time.perf_counter() - start
        start = time.perf_counter()
        for episode in episodes:
            for rows in [*chunks(episode.support, 4), episode.query]:
                batch = data.collate([tokens[e.id] for e in rows], tokenizer.pad_token_id)
                models.token_loss(bare, batch).backward()
                bare.zero_grad()
        ratios.append(ours / (time.perf_counter() - start))
    ratios = sorted(ratios[2:])
    print(f"\nmeta-step / bare forward+backward passes: median {ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    assert ratios[len(ratios) // 2] < 1.25  # the measured figure is in the README; this bound only catches a regression on a noisy machine


@pytest.mark.parametrize("tasks,steps", [(1, 1), (3, 4)])
def test_five_buffers(tasks, steps, process_group):
    """Parameter-sized storage alive during a meta-step: weights, theta, accumulator, Adam's two; the same for any T and K."""
    import gc

    model = small_llama(torch.float32, hidden_size=128, num_hidden_layers=6, intermediate_size=512, vocab_size=256)
    n = sum(p.numel() for p in model.parameters())
    shapes = {tuple(q.shape) for q in model.parameters()}
    episodes, tokens = random_episodes(tasks, 2 * steps, 2)
    optimizer, calls, peak = None, 0, 0

    def storages():
        """{address: bytes} of all tensors in Python's reach with a parameter's shape or all parameters' size."""
        mine = [t for o in gc.get_objects() if isinstance(o, torch.Tensor) for t in (o, o.grad if o.is_leaf else None) if t is not None]
        mine += [t for s in optimizer.state.values() for t in s.values()] if optimizer else []
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in mine if tuple(t.shape) in shapes or t.numel() == n}

    gc.collect()
    others = storages().keys() - {p.untyped_storage().data_ptr() for p in model.parameters()}  # of earlier tests
    learner = plain_learner(model, tokens)
    optimizer = torch.optim.AdamW(learner.buffers.params, lr=1e-3, fused=True)
    fomaml.set_gradients(learner.buffers)
    optimizer.step()  # Adam's state exists from here on
    optimizer.zero_grad()
    largest = max(p.numel() for p in model.parameters())

    def measure(p):
        nonlocal calls, peak
        calls += 1
        if calls % 11 == 0:
            peak = max(peak, sum(size for at, size in storages().items() if at not in others) / 4)

    for p in learner.buffers.params:
        p.register_post_accumulate_grad_hook(measure)
    gc.disable()
    fomaml.meta_gradient(learner, episodes, "fomaml", 2, tasks)
    gc.enable()
    print(f"\nT={tasks}, K={steps}: peak {peak / n:.2f} parameter-sized buffers")
    assert 5 * n <= peak <= 5 * n + 4 * largest  # and a few gradients in flight


# ---------------------------------------------------------------------------------------------------------------------
# Embedded problems against an independent computation


def ints(text):
    return [int(x) for x in re.findall(r"-?\d+", text)]


def expression(text):
    import sympy
    from sympy.parsing.sympy_parser import convert_xor, implicit_multiplication, parse_expr, standard_transformations

    return sympy.expand(parse_expr(text.replace("i", "*I"), transformations=(*standard_transformations, implicit_multiplication, convert_xor)))


def number(answer):
    """An integer or \\frac{a}{b} as a Fraction; \\pi counts as a factor 1 (its presence is checked beside)."""
    sign, body = (-1, answer[1:]) if answer.startswith("-") else (1, answer)
    body = re.sub(r"(\d*)\\pi", lambda m: m[1] or "1", body)
    m = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", body)
    return sign * (Fraction(int(m[1]), int(m[2])) if m else Fraction(int(body)))


def poly(prompt, which=0):
    return expression(re.findall(r"(?:= |Expand )?\$?(?:f\(x\) = |g\(x\) = )?([-\dx^+() ]*x[-\dx^+() ]*)", prompt)[which].replace(")(", ")*("))


def roots(prompt):
    import sympy

    return sympy.Poly(expression(re.search(r"\$(.*) = 0\$", prompt)[1])).all_roots()


def count(n, condition):
    return sum(1 for i in range(1, n + 1) if condition(i))


CHECKS = {
    "add_and_subtract": lambda p, v: sum((v[0], v[1], -v[2])),
    "order_of_operations": lambda p, v: v[0] + sum(v[1] for _ in range(v[2])),
    "percent_of": lambda p, v: Fraction(v[0], 100) * v[1],
    "fraction_sum": lambda p, v: Fraction(v[0], v[1]) + Fraction(v[2], v[3]),
    "unit_price": lambda p, v: Fraction(v[1], v[0]) * v[2],
    "average_of_three": lambda p, v: Fraction(sum(v), 3),
    "linear_equation": lambda p, v: next(x for x in range(-200, 201) if expression(re.search(r"\$(.*) = ", p)[1]).subs("x", x) == v[-1]),
    "evaluate_quadratic": lambda p, v: expression(re.search(r"= (.*?)\$,", p)[1]).subs("x", v[-1]),
    "sum_and_difference": lambda p, v: Fraction(v[0] + v[1], 2),
    "larger_root": lambda p, v: max(roots(p)),
    "slope": lambda p, v: Fraction(v[3] - v[1], v[2] - v[0]),
    "remainder_theorem": lambda p, v: __import__("sympy").rem(expression(re.search(r"when \$(.*?)\$", p)[1]), expression(re.search(r"by \$(.*?)\$", p)[1])),
    "geometric_term": lambda p, v: v[1] * Fraction(v[2], v[1]) ** (v[0] - 1),
    "logarithm": lambda p, v: round(math.log(v[1], v[0])) + v[2] if v[0] ** round(math.log(v[1], v[0])) == v[1] else None,
    "sum_of_squared_roots": lambda p, v: sum(r**2 for r in roots(p)),
    "arithmetic_series": lambda p, v: sum(v[1] + i * (v[2] - v[1]) for i in range(v[0])),
    "composition": lambda p, v: expression(re.search(r"f\(x\) = (.*?)\$", p)[1]).subs("x", expression(re.search(r"g\(x\) = (.*?)\$", p)[1]).subs("x", v[-1])),
    "degrees_to_radians": lambda p, v: Fraction(v[0], 180),
    "dot_product": lambda p, v: sum(x * y for x, y in zip(v[:2], v[2:], strict=True)),
    "determinant": lambda p, v: round(float(torch.linalg.det(torch.tensor(v, dtype=torch.float64).view(2, 2)))),
    "squared_length": lambda p, v: round(math.dist(v, (0, 0, 0)) ** 2),
    "division_remainder": lambda p, v: v[0] - v[1] * (v[0] // v[1]),
    "common_divisor": lambda p, v: max(d for d in range(1, min(v) + 1) if not v[0] % d and not v[1] % d),
    "common_multiple": lambda p, v: next(m for m in range(max(v), v[0] * v[1] + 1) if not m % v[0] and not m % v[1]),
    "divisor_count": lambda p, v: count(v[0], lambda d: v[0] % d == 0),
    "units_digit": lambda p, v: int(str(v[0] ** v[1])[-1]),
    "arrangements": lambda p, v: len(list(__import__("itertools").permutations(range(v[1]), v[0]))),
    "combinations": lambda p, v: len(list(__import__("itertools").combinations(range(v[1]), v[0]))),
    "single_draw": lambda p, v: Fraction(v[0], v[0] + v[1]),
    "outfits": lambda p, v: len(list(__import__("itertools").product(*map(range, v)))),
    "multiples_up_to": lambda p, v: count(v[2], lambda m: m % v[0] == 0),
    "two_draws": lambda p, v: Fraction(v[0], v[0] + v[1]) * Fraction(v[0] - 1, v[0] + v[1] - 1),
    "rectangle_perimeter": lambda p, v: v[0] + v[1] + v[0] + v[1],
    "triangle_area": lambda p, v: Fraction(v[0] * v[1], 2),
    "hypotenuse": lambda p, v: math.isqrt(v[0] ** 2 + v[1] ** 2),
    "sector_area": lambda p, v: Fraction(v[0] ** 2, v[1]),
    "third_angle": lambda p, v: 180 - sum(v),
    "missing_addend": lambda p, v: next(x for x in range(200) if v[0] + x == v[1]),
    "difference_of_products": lambda p, v: sum(v[0] for _ in range(v[1])) - sum(v[2] for _ in range(v[3])),
    "two_step_equation": lambda p, v: next(x for x in range(200) if Fraction(x, int(re.search(r"\{x\}\{(\d+)\}", p)[1])) + v[1] == v[2]),
    "value_of_expression": lambda p, v: expression(re.search(r"is \$(.*)\$", p)[1]).subs({"a": v[0], "b": v[1]}),
    "function_sum": lambda p, v: sum(expression(re.search(r"f\(x\) = (.*?)\$", p)[1]).subs("x", x) for x in v[-2:]),
    "arithmetic_term": lambda p, v: [v[1] + i * (v[2] - v[1]) for i in range(v[0])][-1],
    "digit_sum": lambda p, v: sum(map(int, str(v[0]))),
    "next_multiple": lambda p, v: next(m for m in range(v[1] + 1, v[1] + v[0] + 1) if m % v[0] == 0),
    "other_color": lambda p, v: 1 - Fraction(v[0], v[0] + v[1]),
    "two_menus": lambda p, v: sum(1 for _ in range(v[0]) for _ in range(v[1])) + v[2] * v[3],
    "box_volume": lambda p, v: len(list(__import__("itertools").product(*map(range, v)))),
    "missing_side": lambda p, v: next(x for x in range(200) if x + x + v[1] + v[1] == v[0]),
    "box_surface": lambda p, v: sum(2 * a * b for a, b in __import__("itertools").combinations(v, 2)),
}


@pytest.mark.parametrize("role", data.ROLES)
def test_embedded_answers(role):
    families = data.embedded_examples(40, 7, "train", role) | {n + "/t": r for n, r in data.embedded_examples(20, 7, "test", role).items()}
    checked = 0
    for name, examples in families.items():
        family = name.split("/")[1]
        for e in examples:
            v, a = ints(e.prompt), e.answer
            assert checker.extract_answer(e.response) == a and e.subject == name.split("/")[0]
            if family == "expand_product":
                assert expression(a) == expression(re.search(r"\$(.*)\$", e.prompt)[1].replace(")(", ")*("))
            elif family == "complex_product":
                assert expression(a) == expression(re.search(r"\$(.*)\$", e.prompt)[1].replace(")(", ")*("))
            elif family in ("vector_sum", "scaled_vector"):
                k = v.pop(0) if family == "scaled_vector" else 1
                assert ints(a) == [k * v[0] + v[2], k * v[1] + v[3]]
            elif family == "matrix_times_vector":
                assert ints(a) == (torch.tensor(v[:4]).view(2, 2) @ torch.tensor(v[4:])).tolist()
            elif family == "base_conversion":
                digits, base = re.fullmatch(r"(\d+)_\{(\d+)\}", a).groups()
                assert int(base) == v[1] and int(digits, v[1]) == v[0]
            else:
                assert number(a) == CHECKS[family](e.prompt, v), (e.prompt, a)
                assert ("\\pi" in a) == (family in ("degrees_to_radians", "sector_area"))
            checked += 1
    assert checked > 300
    assert all(len({e.level for e in r}) == 5 for n, r in families.items() if not n.endswith("/t"))


def test_embedded_solutions_are_true():
    """Every "= " in a worked solution that joins plain arithmetic holds."""
    checked = 0
    for examples in data.embedded_examples(20, 3, "train").values():
        for e in examples:
            for clause in re.split(r"[,.] ", e.response.split("\\boxed")[0]):
                sides = [s.strip(" .") for s in clause.replace("\\cdot", "*").split("=")]
                if len(sides) == 2 and all(re.fullmatch(r"[-+*/()\d ^]+", s) for s in sides):
                    if "hypotenuse" in e.id or "arithmetic_series" in e.id or "rectangle" in e.id:
                        continue  # chains and products of sums, written for reading
                    assert expression(sides[0]) == expression(sides[1]), e
                    checked += 1
    assert checked > 800


def test_embedded_splits():
    """No test problem is ever trained on, whatever the seeds; held-out families stay out."""
    trained = {e.prompt for seed in (0, 1) for r in data.embedded_examples(500, seed, "train").values() for e in r}
    tested = {e.prompt for seed in (5, 6) for r in data.embedded_examples(40, seed, "test").values() for e in r}
    assert trained and tested and not trained & tested
    tasks = data.load_tasks("embedded")
    known = data.embedded_examples(1, 0, "train", "pretraining")
    assert [t.heldout for t in tasks] == [False] * 14 + [True] * 7 and not {t.name for t in tasks} & set(known) and len(known) == 35
    assert data.load_tasks("embedded") == tasks
    by_subject = data.load_tasks("embedded", task_column="subject")
    assert [t.name for t in by_subject if not t.heldout] == list(data.FAMILIES)


def test_conventions():
    """The rule can be read off the support rows and answers the query rows; another rule's rows answer them at chance."""
    for kind in ("operation", "cipher"):
        agree = total = 0
        for i in range(30):
            examples = data.convention_examples(kind, i)
            assert len({e.prompt for e in examples}) == 100
            table = {(int(e.prompt[-4 if kind == "operation" else -2]) if kind == "cipher" else int(e.prompt[1]), int(re.findall(r"\d", e.prompt)[-1])): e.answer for e in examples}
            if kind == "operation":
                f = {k: int(v) for k, v in table.items()}
                p, q, s = (f[1, 0] - f[0, 0]) % 10, (f[0, 1] - f[0, 0]) % 10, f[0, 0]
                assert all(v == (p * a + q * b + s) % 10 for (a, b), v in f.items())
            else:
                assert sorted(table[d, d][0] for d in range(10)) == list("0123456789")
                assert all(v == table[a, a][0] + table[b, b][1] for (a, b), v in table.items())
            other = data.convention_examples(kind, i + 100)
            agree += sum(a.answer == b.answer for a, b in zip(examples, other, strict=True))
            total += 100
        assert agree / total < 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Splits, episodes, files


def many(n=50):
    return [Example(f"What is {i} + 1?", f"\\boxed{{{i + 1}}}", str(i + 1), "Algebra", 1 + i % 5, str(i)) for i in range(n)]


def test_split_is_stratified_disjoint_and_order_free():
    support, query, test = data.split(many(), 0.3, 0.4, 1)
    assert [len(support), len(query), len(test)] == [15, 20, 15]
    assert all(sum(e.level == level for e in support) == 3 and sum(e.level == level for e in query) == 4 for level in range(1, 6))
    assert sorted(e.id for part in (support, query, test) for e in part) == sorted(e.id for e in many())
    assert data.split(many()[::-1], 0.3, 0.4, 1) == (support, query, test) != data.split(many(), 0.3, 0.4, 2)


def test_episodes_are_pure_and_replicas_share_the_meta_batch():
    tasks = [t for t in data.load_tasks("embedded") if not t.heldout]
    one = [data.sample_episode(tasks, 1, 5, i, 0, 4, 6, 3) for i in range(4)]
    two = [data.sample_episode(tasks, 1, 5, i, r, 2, 6, 3) for r in range(2) for i in range(2)]
    assert one == two and len({e.task for e in one}) == 4
    assert one != [data.sample_episode(tasks, 1, 6, i, 0, 4, 6, 3) for i in range(4)]
    episode = one[0]
    assert len({e.id for e in episode.support + episode.query}) == 9
    few = [data.sample_episode(tasks[:2], 1, 5, i, 0, 4, 6, 3).task for i in range(4)]
    assert len(set(few[:2])) == 2 and len(set(few[2:])) == 2


def test_prepare_round_trip_and_validate(tmp_path):
    """data.py writes the agreed names and columns; training reads them; a spoilt folder gives status 1 and names the fault."""
    import pyarrow.parquet

    args = data.Args(output_dir=str(tmp_path / "out"), task_column="subject", validate=True)
    assert data.main(args) == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "meta_train" / "counting_&_probability_support.parquet")
    assert table.column_names == ["prompt", "response", "metadata"] and set(json.loads(table.to_pylist()[0]["metadata"])) >= {"subject", "level"}
    before, after = data.load_tasks("embedded", task_column="subject"), {t.name: t for t in data.load_tasks(str(tmp_path / "out"))}
    for t in before:
        if not t.heldout:
            for part in ("support", "query", "test"):
                a, b = getattr(t, part), getattr(after[t.name], part)
                assert [(e.prompt, e.response, e.answer, e.level) for e in a] == [(e.prompt, e.response, e.answer, e.level) for e in b]
    query = tmp_path / "out" / "meta_train" / "algebra_query.parquet"
    spoilt = pyarrow.parquet.read_table(query).to_pylist()
    spoilt[0] |= {"response": "no answer here"}
    spoilt[1] |= {"prompt": table.to_pylist()[3]["prompt"]}
    spoilt[2] |= {"response": "  "}
    pyarrow.parquet.write_table(__import__("pyarrow").Table.from_pylist(spoilt), query)
    problems = "\n".join(data.validate(tmp_path / "out"))
    assert "row 1: no final answer" in problems and "row 4: the same problem is in meta_train/algebra_query" in problems and "row 3: empty" in problems
    assert data.main(data.Args(output_dir=str(tmp_path / "out"), validate_only=True)) == 1


def test_local_formats(tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    table = [{"problem": e.prompt, "solution": e.response, "type": "Algebra" if i % 2 else "Geometry", "level": f"Level {e.level}"} for i, e in enumerate(many())]
    (tmp_path / "a.json").write_text(json.dumps(table))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, table)))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, table)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "d.parquet")
    loaded = [data.load_tasks(str(tmp_path / n)) for n in ("a.json", "b.jsonl", "c.jsonl.gz", "d.parquet")]
    shape = [[(t.name, len(t.support), len(t.query), len(t.test), t.test[0].answer, t.test[0].level) for t in tasks] for tasks in loaded]
    assert shape[0] == shape[1] == shape[2] == shape[3] and [s[0] for s in shape[0]] == ["Algebra", "Geometry"]
    custom = [{"prompt": e.prompt, "response": e.response, "kind": "k"} for e in many()]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, custom)))
    assert [t.name for t in data.load_tasks(str(tmp_path / "e.jsonl"), task_column="kind")] == ["k"]
    with pytest.raises(data.DataError, match="missing column.*subject.*found: prompt, response, kind"):
        data.load_tasks(str(tmp_path / "e.jsonl"))
    with pytest.raises(data.DataError, match="Geometry"):
        data.load_tasks(str(tmp_path / "a.json"), heldout=("Topology",))
    held = data.load_tasks(str(tmp_path / "a.json"), heldout=("Geometry",))
    assert [t.heldout for t in held] == [False, True]
    # the same file as problems with a reward: real models are asked to box the answer, or what --suffix says
    ask = functools.partial(data.load_problems, str(tmp_path / "a.json"), models.load_config("tiny")[1], validation=2, test=3, max_length=512, subjects=("Geometry",), levels=(1, 2, 3))
    parts = [game.examples for game in (*ask()[:2], *ask()[2].values())]
    assert all(e.prompt.endswith(data.BOX) and e.subject == "Geometry" and e.level <= 3 for part in parts for e in part) and len(parts[1]) == 2
    assert len({e.id for part in parts for e in part}) == sum(map(len, parts)) and ask(suffix=" Be brief.")[0].reset(0).prompt.endswith(" Be brief.")
    with pytest.raises(data.DataError, match="0 training problems.*subjects: Algebra, Geometry"):
        ask(subjects=("Topology",))
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"problem": r["problem"], "solution": r["solution"]}) for r in table))
    assert "0 without an answer" in data.load_problems(str(tmp_path / "plain.jsonl"), models.load_config("tiny")[1], validation=2, test=3, max_length=512)[3]


@needs_shared
def test_shared_math():
    """The MATH files work as they are; the test file stays the test split."""
    tasks = data.load_tasks(str(SHARED / "data" / "math"))
    assert len(tasks) == 7 and sum(len(t.test) for t in tasks) == 500
    assert sum(len(t.support) + len(t.query) for t in tasks) > 4400


def test_tokens_and_loss_mask():
    """Anything round-trips; the loss is on the response and its end, nothing else; long rows are dropped and counted."""
    _, tokenizer = models.load_config("tiny")
    for text in ("\\frac{12}{34} \\cdot x^{2} ∘ ∞ é 漢字\n\t{\"cards\": [1, 10]}", "a  b\\\\c $x$", "".join(map(chr, range(32, 300)))):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("1234567890", add_special_tokens=False)["input_ids"]) == 10
    examples = many(3)
    encoded, dropped = data.encode(tokenizer, examples, 2048)
    row = encoded["0"]
    assert dropped == 0 and tokenizer.decode(row.ids) == "<|user|>What is 0 + 1?<|assistant|>\\boxed{1}<|end|>"
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "\\boxed{1}<|end|>"
    batch = data.collate(list(encoded.values()), tokenizer.pad_token_id)
    assert batch["input_ids"].shape[1] % 32 == 0
    assert (batch["labels"] != -100).sum() == sum(len(r.ids) - r.prompt_length for r in encoded.values())
    assert batch["labels"][0, row.prompt_length : len(row.ids)].tolist() == row.ids[row.prompt_length :]
    assert data.encode(tokenizer, examples, 5) == ({}, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The answer checker

EQUAL = [(r"\frac{1}{2}", "0.5"), (r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)(x-1)", "x^2-1"), (r"0.1\overline{6}", r"\frac16"), (r"1\frac12", "3/2"), ("1,234", "1234"), (r"2.5\times10^{-3}", "0.0025"),
         (r"50\%", r"\frac12"), (r"30^\circ", r"\frac{\pi}{6}"), (r"\log_2 8", "3"), (r"\binom{5}{2}", "10"), (r"\lfloor 2.7\rfloor", "2"), (r"e^{i\pi}", "-1"), (r"|3+4i|", "5"),
         (r"x\in[-2,7]", r"-2\le x\le 7"), (r"(0,9)\cup(9,36)", r"(0,36)\setminus\{9\}"), (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2"), ("y=2x+1", "2y-4x=2"), ("x=2 or x=3", "3, 2"),
         (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), (r"\sqrt{x^2}", "|x|"), (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), ("2x+3y<6", "4x+6y<12"), ("4.123105625617661", r"\sqrt{17}"),
         (r"\text{(C)}", "C"), (r"5.4\text{ cents}", "5.4"), (r"6\pi\approx18.85", r"6\pi"), ("101_2", "(101)_{2}"), (r"n\equiv3\pmod7", r"n\equiv10\pmod{7}")]
DIFFERENT = [("2^{100}", "2^{100}+1"), ("3.14", r"\pi"), ("0.33", "1/3"), ("[0,1)", "[0,1]"), ("(1,2)", "(2,1)"), ("(3,1)", r"\{1,3\}"), ("|x|", "x"), ("x>3", "x<3"), ("x^2+y^2=25", "x^2+y^2=5"), ("101_2", "5"),
             (r"\pm3", "3"), (r"2\text{ or }3", "2"), (r"5\text{ cm}", r"5\text{ m}"), ("1,2", "1,2,3"), ("a_1", "a_2"), (r"\text{odd}", r"\text{even}"), ("1e-30", "0"), ("1.0000000001", "1"), ("i", "-i"), ("", "0"), ("x=5", "y=5"), (r"20\%", r"\$20"),
             (r"1\frac45", "14/5"), ("I(0)e^{-t}", "0")]


def test_checker_pairs():
    for a, b in EQUAL:
        assert checker.is_equal(a, b) and checker.is_equal(b, a) and checker.grade(rf"So it is $\boxed{{{a}}}$.", b), (a, b)
    for a, b in DIFFERENT:
        assert not checker.is_equal(a, b) and not checker.is_equal(b, a), (a, b)


def test_extract_answer():
    for text, answer in [(r"so \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{3} then \boxed{open {", "3"), (r"\boxed{2} and \boxed{3}", "2, 3"), (r"\boxed 5.", "5"), ("none", None),
                         ("#### 72", "72"), ("The answer is 3.5. I hope so.", "3.5"), (r"The largest $n$ is, finally, $\frac12$", r"\frac12"), ("12 apples, so 1,250 in all", "1,250"), ("it grows by 10 to 100%.", "100%"),
                         (r"Final Answer: The largest $n$ is 34.", "34"), ("", None)]:
        assert checker.extract_answer(text) == answer, text
    start = time.perf_counter()
    checker.extract_answer("\\boxed{" * 100_000)
    assert time.perf_counter() - start < 1


def spellings(rng):
    """(a value's LaTeX, the same value otherwise spelled, another value): random rational expressions in x with one number changed."""
    a, b, c, d = (rng.randint(2, 40) for _ in range(4))
    n = rng.randint(2, 5)
    forms = [(rf"\frac{{{a}x+{b}}}{{{c}}}", rf"\dfrac{a}{{{c}}}x + \tfrac{{{b}}}{c}" if a < 10 and c < 10 else rf"\left({b}+{a} \cdot x\right)/{c}", rf"\frac{{{a}x+{b}}}{{{c + 1}}}"),
             (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"\sqrt{{{a * a * b + 1}}}"), (rf"(x+{a})^{n}", rf"(x+{a})^{{{n - 1}}}\left({a}+x\right)", rf"(x+{a})^{n + 1}"),
             (rf"\left({a}, \frac{{{b}}}{{{c}}}\right]", rf"({a},{b}/{c}]", rf"({a},{b}/{c})"), (rf"\{{{a},{b + 40},{c + 80}\}}", f"{c + 80}, {a}, {b + 40}", f"{c + 81}, {a}, {b + 40}"),
             (f"{a * 1000 + 100 + b}", f"{a},{100 + b}", f"{a},{101 + b}"), (rf"{a}x+{b}y={c}", rf"{n * b}y = {n * c} - {n * a}x", rf"{n * b}y = {n * c} + {n * a}x"),
             (rf"{a}\pi r^{{{n}}}", rf"r^{n}\cdot{a}\pi", rf"{a}\pi r^{{{n + 1}}}"), (rf"\log_{{{a}}} {a**n}", f"{n}", f"{n + 1}"), (rf"{a}+{b}i", rf"{b}i+{a}", rf"{a}-{b}i")]
    return rng.choice(forms)


def test_checker_properties():
    """Random expressions spelled otherwise are accepted, with one number changed they are not; random text raises nothing."""
    rng = random.Random(3)
    for _ in range(300):
        a, same, other = spellings(rng)
        assert checker.is_equal(a, same) and checker.is_equal(same, a), (a, same)
        assert not checker.is_equal(other, a) and not checker.is_equal(a, other), (a, other)
    pieces = ["\\frac", "{", "}", "(", ")", "[", "]", "^", "_", "\\sqrt", "12", "x", "|", "\\pm", "!", ",", "=", "<", "\\cup", "\\text{", "\\begin{pmatrix}", "\\\\", "&", "%", "\\log", "\\infty", ".", "-", "e", "\\binom", "9" * 30, "\\boxed{", "$", "é"]
    for _ in range(3000):
        a, b = ("".join(rng.choice(pieces) for _ in range(rng.randint(1, 25))) for _ in range(2))
        assert checker.is_equal(a, b) in (True, False) and checker.grade(a, b) in (True, False)


@needs_shared
def test_checker_cases_and_hostile_rows(capsys):
    """The labelled cases; hostile rows on either side, also in a thread: half a second each, 300 MB, no exception."""
    import resource
    import threading

    assert checker.main([str(SHARED / "checker" / "cases.jsonl")]) == 0
    report = capsys.readouterr().out
    assert float(re.search(r"([\d.]+)% right", report)[1]) >= 99.5 and " 0 false accepts" in report, report
    hostile = [json.loads(line) for line in (SHARED / "checker" / "hostile.jsonl").read_text().splitlines()]
    slow, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def grade_all():
        for row in hostile:
            for a, b in ((row["response"], row["gold"]), (row["gold"], row["response"])):
                start = time.perf_counter()
                checker.grade(a, b), checker.is_equal(a, b)
                if time.perf_counter() - start > 0.5:
                    slow.append(row["name"])

    grade_all()
    thread = threading.Thread(target=grade_all)
    thread.start()
    thread.join()
    assert not slow and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@needs_shared
def test_checker_golds():
    """Every gold accepts itself; a gold accepts others only where they are truly equal (the accepted pairs were read by hand)."""
    import gzip

    golds = [json.loads(line)["answer"] for folder in ("math", "bench") for f in sorted((SHARED / "data" / folder).glob("*.gz")) if "mmlu" not in f.name for line in gzip.open(f, "rt")]
    assert len(golds) > 7000 and all(checker.is_equal(g, g) and checker.grade(f"It is $\\boxed{{{g}}}$.", g) for g in golds)
    rng, accepted = random.Random(0), 0
    for g in golds[:5000]:
        for other in rng.sample(golds, 3):
            accepted += checker.plain(checker.clean(other)) != checker.plain(checker.clean(g)) and checker.is_equal(other, g)
    assert accepted < 20


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_statistics():
    """pass@k against all subsets, the bootstrap's coverage on simulated data, Wilson's and McNemar's known values."""
    import itertools

    for n, right, k in ((5, 2, 3), (6, 0, 2), (6, 5, 4), (8, 3, 1)):
        outcomes = [1] * right + [0] * (n - right)
        subsets = list(itertools.combinations(outcomes, k))
        assert evaluation.pass_at_k(n, right, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    rng, covered = random.Random(0), 0
    for i in range(200):
        low, high = evaluation.bootstrap([rng.random() < 0.3 for _ in range(150)], seed=i, draws=400)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99
    assert evaluation.mcnemar(1, 8) == pytest.approx(0.0390625) and evaluation.mcnemar(3, 3) == 1.0 and evaluation.mcnemar(0, 0) == 1.0
    assert evaluation.wilson(8, 10) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6)) and evaluation.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def test_judging_choices():
    p = evaluation._problem({"question": "Which?", "choices": {"text": ["3", "4", "5", "6"], "label": ["1", "2", "3", "4"]}, "answerKey": "2"}, "arc")
    assert p.answer == "B" and evaluation.judge(r"so \boxed{B}", p) and evaluation.judge(r"\boxed{4}", p) and evaluation.judge("The answer is (B) 4.", p) and not evaluation.judge(r"\boxed{C}", p)
    g = evaluation._problem({"Question": "Which one?", "Correct Answer": "x", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"}, "gpqa")
    assert sorted(g.choices) == ["a", "b", "c", "x"] and g.choices["ABCD".index(g.answer)] == "x"
    assert evaluation._problem({"question": "How many?", "answer": "6 + 1 = 7\n#### 7"}, "gsm8k").answer == "7"


def test_benchmark_continues_after_a_kill(tmp_path, small_model):
    """SIGKILL in the middle, the same command again: every response once, the same as those of an uninterrupted run."""
    command = ["eval.py", "--model", small_model, "--benchmark", "embedded", "--limit", "60", "--max-length", "8", "--samples", "2", "--batch-size", "6", "--temperature", "1"]
    whole = run(*command, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, *map(str, command), "--output-dir", str(cut)], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    responses = cut / "responses-0.jsonl"
    deadline = time.time() + 100
    while time.time() < deadline and not (responses.exists() and responses.read_text().count("\n") >= 12):
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = responses.read_text()
    responses.write_text(kept + '{"model": "half a li')
    assert run(*command, "--output-dir", cut).returncode == 0
    read = lambda folder: sorted((r["id"], r["sample"], r["response"]) for line in (folder / "responses-0.jsonl").read_text().splitlines() if line.endswith("}") for r in [json.loads(line)])  # noqa: E731
    a, b = read(tmp_path / "whole"), read(cut)
    assert len(a) == 120 and [x[:2] for x in a] == [x[:2] for x in b] and sum(x == y for x, y in zip(a, b, strict=True)) >= 118
    assert run(*command, "--seed", "1", "--output-dir", cut).returncode == 2


def test_games_as_benchmarks(tmp_path):
    """A killed evaluation of a game continues; won episodes and right turns are those that the written answers earn when played again."""
    args = evaluation.Args(model=("tiny_games",), benchmark=("general_points",), compact=True, limit=6, samples=2, temperature=1.0, max_length=64, output_dir=str(tmp_path / "g"))
    assert evaluation.main(args) == 0
    file = tmp_path / "g" / "responses-0.jsonl"
    first, whole = json.loads((tmp_path / "g" / "results.json").read_text()), file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:10]) + '{"model": "tiny_ga')
    assert evaluation.main(args) == 0
    assert json.loads((tmp_path / "g" / "results.json").read_text()) == first
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert len(lines) == 24 and len({(r["id"], r["sample"]) for r in lines}) == 24
    tests = games.games_of("general_points", compact=True)[2]
    for r in lines:
        _, name, i = r["id"].split("/")
        state = tests[name].reset(int(i))
        results = [tests[name].step(state, text) for text in r["response"]]
        assert results[-1].won == r["right"] and results[-1].done and sum(x.reward for x in results) == r["reward"] and sum(x.reward > 0 for x in results) == r["right_turns"]
    summary = first["benchmarks"]["tiny_games"]["general_points (in distribution)"]
    assert summary["problems"] == 6 and summary["accuracy"] == sum(r["right"] for r in lines if "in distribution" in r["id"]) / 12 and 0 <= summary["step_accuracy"] <= 1


def test_few_shot_study(tmp_path, small_model, monkeypatch):
    """Adaptation lowers the loss on the shots' task, weights are restored bit for bit, two equal models differ by nothing."""
    kept = []
    load = models.load_weights
    monkeypatch.setattr(models, "load_weights", lambda *a, **k: kept.append(load(*a, **k)) or kept[-1])
    args = evaluation.Args(model=(str(small_model),), few_shot=(0, 2, 6), seeds=2, tasks=("Geometry/missing_side",), adapt_lr=3e-3, adapt_steps=5, limit=8, max_length=4, output_dir=str(tmp_path / "study"))
    args.model = (str(small_model), str(small_model) + "/")
    assert evaluation.main(args) == 0
    before = load(str(small_model)).state_dict()
    assert all(torch.equal(v, before[n]) for model in kept for n, v in model.state_dict().items())
    report = json.loads((tmp_path / "study" / "results.json").read_text())
    assert {(r["shots"], r["seed"]) for r in report["few_shot"]} == {(0, 0), (2, 0), (2, 1), (6, 0), (6, 1)}
    curve = next(r["curve"] for r in report["few_shot"] if r["shots"] == 6)
    assert list(curve) == ["0", "1", "2", "5"] and curve["5"] < curve["0"]
    assert all(p["difference"] == 0 and p["mcnemar"] == 1 for p in report["pairs"])


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input: one line, status 2, before any weight is read


BAD = [(["--inner-steps", "0"], "--inner-steps must be at least 1"), (["--replicas", "2"], "--replicas 2 does not divide the 1 ranks"),
       (["--data", "/no/such"], "no such file or folder"), (["--model", "/no/such"], "no such model folder"), (["--support-batch", "100"], "it needs 100"),
       (["--support-ratio", "0.7"], "sum to at most 1"), (["--heldout-subjects", "Topology"], "no such task or subject"),
       (["--task-column", "colour"], "grouped by family or subject"), (["--meta-gradient", "maml", "--micro-batch", "1"], "one process"),
       (["--max-length", "8"], "needs"), (["--inner-lr", "nan"], "positive number")]


LORA_BAD = [(["--target-modules", "q_proj", "c_attn"], "c_attn: the model has no such linear layer; it has down_proj, gate_proj"), (["--dropout", "1"], "--dropout must be in [0, 1)"),
            (["--r", "0"], "--r must be at least 1"), (["--model", "/no/such"], "no such model folder")]
AMFT_BAD = [(["--model", "/no/such"], "no such model folder"), (["--data", "/no/such"], "no such file or folder"), (["--samples", "1"], "--samples must be at least 2"),
            (["--mu-init", "0.99"], "--mu-min <= --mu-init"), (["--epochs", "2"], "one optimizer step per rollout"), (["--replicas", "2"], "--replicas 2 does not divide"),
            (["--method", "luffy", "--advantage", "gae"], "advantages of its own"), (["--subjects", "Topology"], "subjects: Algebra"), (["--validation-size", "99999"], "more than --validation-size"),
            (["--warmup-steps", "99"], "--warmup-steps must be between"), (["--vision"], "--vision is for the games"), (["--task", "virl", "--routes", "/no"], "not a route file"), (["--lr", "nan"], "positive number")]
EVAL_BAD = [(["--benchmark", "nope"], "--benchmark nope: unknown; there are embedded, general_points, virl, math500"), (["--samples", "4", "--temperature", "0"], "--samples above 1"), (["--benchmark", "mine", "--data", "/no/such.jsonl"], "cannot read"), (["--data", "x.jsonl"], "name it with --benchmark"),
            (["--few-shot", "5", "--tasks", "Topology"], "no such task"), (["--model", "/no/such"], "no such model folder")]


def test_bad_input(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(models, "load_weights", lambda *a, **k: pytest.fail("weights were read"))
    for script, cases in ((fomaml, BAD), (meta_lora, LORA_BAD), (amft, AMFT_BAD), (evaluation, EVAL_BAD)):
        for i, (extra, message) in enumerate(cases):
            monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *extra, "--output-dir", str(tmp_path / f"{script.__name__}{i}")])
            assert script.cli() == 2, extra
            err = capsys.readouterr().err
            assert message in err and err.count("\n") == 1, (extra, err)
    assert not any(f.name != "args.json" for folder in tmp_path.iterdir() for f in folder.iterdir())


def test_command_lines(tmp_path, small_model):
    """Exit statuses as a user's shell sees them; --help names every option; the environment test reads no weights."""
    bad = run("fomaml.py", "--model", "/no/such")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    help_text = run("fomaml.py", "--help").stdout
    assert all(f"--{f.replace('_', '-')}" in help_text for f in fomaml.Args.__dataclass_fields__)
    (tmp_path / "empty.jsonl").write_text("")
    assert run("data.py", "--data", tmp_path / "empty.jsonl", "--output-dir", tmp_path / "o").returncode == 2
    assert run("data.py", "--support-ratio", "0.9", "--output-dir", tmp_path / "o").returncode == 2
    bare = tmp_path / "bare"  # config and tokenizer, no weights
    bare.mkdir()
    for f in small_model.iterdir():
        if f.suffix != ".safetensors":
            (bare / f.name).write_bytes(f.read_bytes())
    dry = run("fomaml.py", "--model", bare, "--dry-run")
    assert dry.returncode == 0 and "ready" in dry.stdout and "all-reduce works" in dry.stdout, dry.stderr[-2000:]
    dry = run("amft.py", "--model", bare, "--dry-run")
    assert dry.returncode == 0 and "ready" in dry.stdout, dry.stderr[-2000:]
    worse = run("fomaml.py", "--model", bare, "--dry-run", "--support-batch", "50")
    assert worse.returncode == 1 and "cannot finish: task" in worse.stdout


if __name__ == "__main__":
    gradients_main(Path(sys.argv[1]))

"""meta_lora.py and lora.py: both stages against independent computations; files; ranks; time."""

import inspect
import json
import math
import pickle
import random
import signal
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import bench
import meta_lora
import plots
import run
from data import (
    DataError,
    Encoded,
    Example,
    Task,
    draw_support,
    response_tokens,
    sample_episode,
)
from lora import (
    AdapterCheckpoint,
    Adapters,
    adapter_size,
    check_targets,
    dropout,
    linear_layers,
    write_adapter,
    write_merged,
)
from model import ModelError, World, layers_to_shard, load_config, load_weights, skeleton
from tests.helpers import (
    META_RUN,
    ROOT,
    all_rows,
    assert_same_weights,
    chunks,
    final_weights,
    functional,
    logged,
    one_rank_mesh,
    random_episodes,
    reference_loss,
    run_here,
    run_well,
    small_llama,
    weights_of,
)

NEEDS_PEFT = "peft is not installed; .ci/run installs it for this test"
CPU = torch.device("cpu")
TARGETS = meta_lora.Args().target_modules


def adapters_on(model, **settings) -> Adapters:
    defaults = {
        "r": 3,
        "alpha": 6,
        "dropout": 0.0,
        "target_modules": TARGETS,
        "rank_stabilised": False,
        "seed": 42,
        "device": torch.device("cpu"),
    }
    return Adapters(model, **defaults | settings)


def lora_learner(model, tokens, **settings) -> meta_lora.AdapterLearner:
    """A learner on float64 adapters whose B is not zero, so that every gradient matters."""
    defaults = {"inner_lr": 0.02, "inner_optimizer": "sgd", "support_batch": 2, "tasks_per_step": 3}
    args = meta_lora.Args(**defaults | settings)
    adapters = adapters_on(model.requires_grad_(False))
    generator = torch.Generator().manual_seed(1)
    adapters.phi = [
        0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in adapters.phi
    ]
    world = World(torch.device("cpu"))
    return meta_lora.AdapterLearner(model, adapters, args, world, 0, tokens)


def meta_gradient(learner, one_group, episodes, together: int = 3) -> tuple:
    """What meta_lora.py does with a round: (meta-gradient, losses [T, 3]), `together` tasks in one
    forward."""
    torch._foreach_zero_(learner.meta_gradient)
    losses = torch.zeros(len(episodes), 3)
    for first in range(0, len(episodes), together):
        group = episodes[first : first + together]
        rows = losses[first : first + together]
        rows[:, 2] = learner.query_losses(group)
        rows[:, 0], rows[:, 1] = one_group(group)
    return [g.clone() for g in learner.meta_gradient], losses


def test_lora_dropout():
    """Its share, scale, mask in the gradient, independence of neighbours (four share a random
    number), and determinism."""
    x = torch.ones(64, 33, 127, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.05)
    y.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(y, dropout(x, 0.05)), "not the same for the same seed"
    assert torch.equal(x.grad, y.detach())
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.95])
    assert torch.equal(dropout(x, 0.0), x)
    dropped = (y == 0).flatten().double()
    groups = {"all": dropped}
    for k in range(4):
        groups[f"number {k} of four"] = dropped[k::4]
    groups["after a dropped one"] = dropped[1:][dropped[:-1] == 1]
    groups["before a dropped one"] = dropped[:-1][dropped[1:] == 1]
    groups["two before a dropped one"] = dropped[:-2][dropped[2:] == 1]
    for name, which in groups.items():
        deviation = 5 * math.sqrt(0.05 * 0.95 / len(which))
        assert which.mean().item() == pytest.approx(0.05, abs=deviation), name


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_clip": 0.3}, {"inner_optimizer": "adam", "inner_lr": 0.003}],
    ids=["sgd", "clip", "adam"],
)
def test_lora_batched_stage_one(options):
    """All tasks in one forward equal task after task, whatever the chunk; the base is bitwise
    untouched."""
    model = small_llama()
    before = weights_of(model)
    episodes, tokens = random_episodes(3, 6, 4)
    learner = lora_learner(model, tokens, **options)
    steps = meta_lora.support_steps(episodes, 2)
    for k, batches in enumerate(steps):
        assert batches == [e.support[2 * k : 2 * k + 2] for e in episodes], f"step {k}"
    history = learner.inner_loop(steps)  # [K, T]
    together = [p.detach().clone() for p in learner.adapters.stack]
    for i in range(3):
        alone = learner.inner_loop([[batches[i]] for batches in steps])
        torch.testing.assert_close(history[:, i], alone[:, 0], rtol=1e-9, atol=1e-10)
        for a, b in zip(together, learner.adapters.stack, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-7, atol=1e-9)
    whole, losses = meta_gradient(learner, learner.fomaml, episodes)
    chunked, same = meta_gradient(learner, learner.fomaml, episodes, together=1)
    torch.testing.assert_close(losses, same)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert_same_weights(weights_of(model), before, "base")
    for name, p in model.named_parameters():
        assert p.grad is None, f"{name}: a gradient is left"


def test_evaluation_measures_without_dropout():
    """Which is on in every inner step, also after a measurement, and off after the last."""
    episodes, tokens = random_episodes(1, 6, 2)
    learner = lora_learner(small_llama(), tokens)
    mean_losses, seen = learner.mean_losses, []

    def step(batches):
        seen.append(("step", learner.adapters.training))
        return mean_losses(batches)

    learner.mean_losses = step
    learner.adapt(episodes[0].support, lambda k: seen.append((k, learner.adapters.training)))
    measured = [("step", True), (1, False), ("step", True), (2, False), ("step", True), (3, False)]
    assert seen == measured
    assert not learner.adapters.training


class Folded:
    """The adapter folded into the weights of a model without hooks: W + scale B A."""

    def __init__(self, layers: list[str], tokens):
        self.layers, self.tokens = layers, tokens
        self.model = small_llama()
        self.weights = weights_of(self.model)

    def loss(self, adapter: list, examples) -> torch.Tensor:
        weights = dict(self.weights)
        for i, layer in enumerate(self.layers):
            A, B = adapter[2 * i : 2 * i + 2]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 2.0 * B @ A
        rows = [self.tokens[e.id] for e in examples]
        return reference_loss(functional(self.model, weights), rows)

    def gradient(self, adapter: list, examples):
        return torch.autograd.grad(self.loss(adapter, examples), adapter)


@pytest.mark.parametrize(
    "method,optimizer",
    [("fomaml", "sgd"), ("fomaml", "adam"), ("reptile", "sgd"), ("joint", "sgd")],
)
def test_lora_meta_gradient(method, optimizer):
    """Against an independent computation: adapters folded into the weights, functional_call,
    torch.optim."""
    lr = {"sgd": 0.02, "adam": 0.003}[optimizer]
    episodes, tokens = random_episodes(3, 4, 2)
    learner = lora_learner(small_llama(), tokens, inner_optimizer=optimizer, inner_lr=lr)
    phi = learner.adapters.phi
    assert learner.adapters.scale == 2.0
    folded = Folded(list(learner.adapters.layers), tokens)

    def adapted(batches: list) -> list:
        """phi_i by torch.optim."""
        phi_i = [p.clone().requires_grad_() for p in phi]
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
        steps = kind(phi_i, lr=lr)
        for examples in batches:
            steps.zero_grad()
            folded.loss(phi_i, examples).backward()
            steps.step()
        return phi_i

    one_group = getattr(learner, method)
    expected = [torch.zeros_like(p) for p in phi]
    if method == "joint":
        rows = all_rows(episodes)
        union = learner.union_tokens(episodes)
        assert union == response_tokens([tokens[e.id] for e in rows])
        expected = folded.gradient([p.clone().requires_grad_() for p in phi], rows)

        def one_group(group):
            return learner.joint(union, group)
    else:
        for episode in episodes:
            batches = chunks(episode.support, 2)
            if method == "reptile":
                phi_i = adapted([*batches, episode.query])
                changes = [p.detach() - q for p, q in zip(phi_i, phi, strict=True)]
            else:
                changes = folded.gradient(adapted(batches), episode.query)
            expected = [e + g / 3 for e, g in zip(expected, changes, strict=True)]
    got, _ = meta_gradient(learner, one_group, episodes)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


def test_adapter_in_peft_and_merged(tmp_path, small_model, process_group):
    """The saved adapter gives the same logits in peft; so do the merged weights in transformers."""
    from transformers import AutoModelForCausalLM

    base = load_weights(str(small_model)).eval()
    adapters = adapters_on(base, r=4, rank_stabilised=True)
    for i, p in enumerate(adapters.phi):
        p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    write_adapter(tmp_path, adapters, str(small_model))
    _, tokenizer = load_config("tiny")
    write_merged(tmp_path / "merged", base, adapters, tokenizer, torch.float32)
    ids = torch.randint(3, 90, (2, 20))
    adapters.start(1)
    with torch.no_grad():
        logits = base(ids).logits
        plain = load_weights(str(small_model)).eval()
        assert (plain(ids).logits - logits).abs().max() > 0.1
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
        peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_lora_two_ranks_equal_one(tmp_path, small_model):
    """One round with the tasks split over two ranks and the base sharded equals one rank's."""
    round_of = [
        "--model", small_model, "--steps", "1", "--inner-steps", "2", "--tasks-per-step", "2",
        "--support-batch", "2", "--query-batch", "2", "--dropout", "0", "--inner-optimizer", "sgd",
        "--inner-lr", "0.1", "--eval-every", "-1",
    ]  # fmt: skip
    assert run_here(meta_lora, *round_of, "--output-dir", tmp_path / "0") == 0
    run_well("meta_lora.py", *round_of, "--output-dir", tmp_path / "2", ranks=2)
    one, two = (logged(tmp_path / str(ranks))[0] for ranks in (0, 2))
    for name in ("meta/grad_norm", "meta/loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-5), name
    assert one == pytest.approx(two, rel=1e-4)  # of each task, too
    one, two = (final_weights(tmp_path / str(ranks)) for ranks in (0, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=3e-5, msg=name)


@pytest.mark.parametrize("length,rows,least", [(96, 4, 0.9), (32, 1, 1.3)])
def test_round_against_peft(length, rows, least):
    """A round of T = 4, K = 10, AdamW with all tasks in one forward, and with PEFT task after task.

    docs/cost.md has the measured figures (targets 1.2 and 2); the bounds here only catch a
    regression on a noisy machine."""
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    ours, peft = (side("tiny", "cpu", rows, length) for side in (bench.lora_ours, bench.lora_peft))
    pairs = [(bench.timed(ours), bench.timed(peft)) for _ in range(4)]
    ratios = sorted(theirs / mine for mine, theirs in pairs[1:])
    print(
        f"\n{rows} x {length} tokens a task: PEFT task after task / one forward for all: "
        f"median {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    assert ratios[1] > least


# --------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("p,dropped", [(0.25, 16384), (0.5, 32768), (0.05, 3277)])
def test_share_of_dropout(p, dropped, monkeypatch):
    """Of all numbers of 16 bits, once each: as many are dropped as p says; sizes that four does not
    divide."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)

    def fill(empty, low, high):
        assert (low, high) == (-(2**63), None)
        numbers = bits[torch.arange(4 * len(empty)) % 2**16]
        return empty.copy_(numbers.view(torch.long))

    monkeypatch.setattr(torch.Tensor, "random_", fill)
    y = dropout(torch.ones(2**16 + 3), p)[: 2**16]
    assert (y == 0).sum().item() == dropped
    assert (y == 0).nonzero().max().item() == dropped - 1  # the lowest ones
    assert y[-1].item() == pytest.approx(1 / (1 - p))


def test_an_adapter_at_its_start():
    """A is uniform in +-1 / sqrt(d_in), from the seed; B is zero, so nothing changes."""
    model = small_llama(torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    adapters = adapters_on(model, r=64)
    names = [n for n, m in model.named_modules() if n.split(".")[-1] in TARGETS]
    assert list(adapters.layers) == names
    assert len(adapters.phi) == 2 * len(names) == 28
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "gate_proj": (32, 48), "down_proj": (48, 32)}
    for i, name in enumerate(names):
        A, B = adapters.phi[2 * i : 2 * i + 2]
        assert B.abs().max() == 0
        bound = A.shape[1] ** -0.5
        assert A.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert A.abs().max().item() <= bound
        assert A.mean().item() == pytest.approx(0, abs=4 * bound / math.sqrt(3 * A.numel()))
        last = name.split(".")[-1]
        if last in sizes:
            assert (A.shape, B.shape) == ((64, sizes[last][0]), (sizes[last][1], 64))
    adapters.start(1)
    assert torch.equal(model(ids).logits, expected)
    other = adapters_on(small_llama(torch.float32), r=64)
    assert torch.equal(other.phi[0], adapters.phi[0])
    other = adapters_on(small_llama(torch.float32), r=64, seed=43)
    assert not torch.equal(other.phi[0], adapters.phi[0])


def test_scale_of_an_adapter():
    model = small_llama()
    assert adapters_on(model, r=4, alpha=6).scale == 1.5
    assert adapters_on(model, r=4, alpha=6, rank_stabilised=True).scale == 3.0


def test_adapters_of_tasks_are_copies_of_phi():
    adapters = adapters_on(small_llama())
    adapters.start(3)
    for p, phi in zip(adapters.stack, adapters.phi, strict=True):
        assert p.shape == (3, *phi.shape)
        assert p.requires_grad
        assert p.is_leaf
        assert torch.equal(p, phi.expand_as(p))
        with torch.no_grad():
            p += 1
        assert not torch.equal(p[0], phi)
    adapters.train_phi()
    assert adapters.stack is adapters.phi
    assert all(p.requires_grad for p in adapters.phi)


def test_phi_itself_is_the_adapter_of_all_rows():
    """Where it is trained; dropout is on within with_dropout alone, on the adapter's input."""
    model = small_llama(torch.float32).requires_grad_(False)
    adapters = adapters_on(model, dropout=0.5)
    for i, p in enumerate(adapters.phi):
        p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    adapters.start(1)
    expected = model(ids).logits
    adapters.train_phi()
    torch.testing.assert_close(model(ids).logits, expected)
    with adapters.with_dropout():
        assert adapters.training
        assert not torch.allclose(model(ids).logits, expected)
    assert not adapters.training
    torch.testing.assert_close(model(ids).logits, expected)
    with pytest.raises(ZeroDivisionError), adapters.with_dropout():
        raise ZeroDivisionError
    assert not adapters.training
    layer = next(iter(adapters.layers.values()))  # one whose output is y = W x + scale B A x
    x = torch.ones(1, 2000, 32)
    torch.manual_seed(0)
    with adapters.with_dropout():
        changes = layer(x) - torch.nn.functional.linear(x, layer.weight)
    A, B = adapters.phi[:2]
    mean = 2.0 * B @ (A @ torch.ones(32))
    torch.testing.assert_close(changes.mean((0, 1)), mean, rtol=0.2, atol=0.15)
    assert changes.std(1).min() > 0


def test_layers_of_a_vision_model():
    """Only those of the language model get an adapter."""
    model = skeleton(load_config("tiny_vision")[0])
    names = list(linear_layers(model))
    assert names
    assert all("language_model" in name for name in names if name != "lm_head")
    assert any("vision" in n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    model = small_llama()
    everywhere = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert list(linear_layers(model)) == everywhere
    assert len(everywhere) == 15


def test_targets_that_are_not_there():
    model = small_llama()
    check_targets(model, ("q_proj", "lm_head"))
    with pytest.raises(ModelError, match="^--target-modules: name at least one$"):
        check_targets(model, ())
    message = (
        "--target-modules c_attn mlp: the model has no such linear layer; it has down_proj, "
        "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )
    with pytest.raises(ModelError, match=f"^{message}$"):
        check_targets(model, ("q_proj", "c_attn", "mlp"))


def test_size_of_an_adapter():
    """Two layers, by hand: k_proj 32 x 16 and down_proj 48 x 32 in each of two blocks."""
    model = small_llama()
    targets = ("k_proj", "down_proj")
    assert adapter_size(model, 3, targets) == 2 * 3 * (32 + 16 + 48 + 32)
    adapters = adapters_on(model, target_modules=targets)
    assert sum(p.numel() for p in adapters.phi) == adapter_size(model, 3, targets)


def test_files_of_an_adapter(tmp_path):
    from safetensors.torch import load_file

    model = small_llama(torch.float32)
    adapters = adapters_on(model, r=2, alpha=5, dropout=0.1, target_modules=("o_proj", "up_proj"))
    for i, p in enumerate(adapters.phi):
        p.fill_(i)
    write_adapter(tmp_path, adapters, "some/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "target_modules": ["o_proj", "up_proj"],
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }
    assert (tmp_path / "adapter_config.json").read_text().startswith('{\n "peft_type"')
    weights = load_file(tmp_path / "adapter_model.safetensors")
    values = {name: (tuple(w.shape), w.unique().tolist()) for name, w in weights.items()}
    expected, i = {}, 0
    for block in range(2):
        for layer, d_in, d_out in (("self_attn.o_proj", 32, 32), ("mlp.up_proj", 32, 48)):
            name = f"base_model.model.model.layers.{block}.{layer}"
            expected[f"{name}.lora_A.weight"] = ((2, d_in), [i])
            expected[f"{name}.lora_B.weight"] = ((d_out, 2), [i + 1])
            i += 2
    assert values == expected


@pytest.mark.parametrize("beside", [False, True])
def test_checkpoint_of_an_adapter(beside, tmp_path, process_group):
    """phi, what is trained beside it and the optimizer's state come back; an older file has nothing
    beside."""
    (tmp_path / "state").mkdir()
    found = []
    for seed in (1, 2):
        adapters = adapters_on(small_llama(torch.float32), seed=seed)
        head = [torch.full((2,), float(seed))] if beside else []
        optimizer = torch.optim.AdamW([*adapters.phi, *head], lr=0.1 * seed)
        checkpoint = AdapterCheckpoint(adapters, optimizer, "base", head)
        if seed == 1:
            for p in (*adapters.phi, *head):
                p.grad = torch.ones_like(p)
            optimizer.step()
            checkpoint.write(tmp_path)
        else:
            checkpoint.read(tmp_path)
        found.append([*(p.detach() for p in (*adapters.phi, *head)), optimizer.state_dict()])
    *first, state = found[0]
    *second, same_state = found[1]
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
    assert same_state["param_groups"] == state["param_groups"]
    assert same_state["state"].keys() == state["state"].keys()
    assert same_state["state"][0]["exp_avg"].max() > 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    more = AdapterCheckpoint(adapters, optimizer, "base", [*head, torch.zeros(1)])
    with pytest.raises(ValueError, match="shorter"):
        more.read(tmp_path)
    torch.save({"phi": [], "code": Path.cwd}, tmp_path / "state" / "adapter.pt")
    with pytest.raises(pickle.UnpicklingError):  # a file holds numbers, nothing that is run
        checkpoint.read(tmp_path)


def test_dropout_beside_a_gpu_is_torchs(monkeypatch):
    """On other devices than a CPU the library draws, in training alone."""
    asked = []
    monkeypatch.setattr("lora.F.dropout", lambda x, *args: asked.append(args) or x)
    x = torch.empty(3, device="meta")
    assert dropout(x, 0.25) is x
    assert dropout(x, 0.0) is x
    assert asked == [(0.25, True), (0.0, False)]


def test_an_adapter_beside_half_precision():
    """The base in bf16, the adapter in fp32, of one task or two: bf16 goes on, and only x and A are
    rounded to it."""
    model = small_llama(torch.bfloat16).requires_grad_(False)
    adapters = adapters_on(model, r=4, alpha=4)
    generator = torch.Generator().manual_seed(0)
    for p in adapters.phi:
        p.copy_(torch.randn(p.shape, generator=generator))
    layer = next(iter(adapters.layers.values()))
    x = torch.randn(2, 5, 32, generator=generator).bfloat16()
    A, B = adapters.phi[:2]
    low = (x @ A.bfloat16().T).float()
    expected = (torch.nn.functional.linear(x, layer.weight).float() + low @ B.T).bfloat16()
    for tasks in (1, 2):
        adapters.start(tasks)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2**-6, atol=0.1)


def test_merged_weights_are_rounded_once(tmp_path, small_model, process_group):
    """bf16(W + scale B A), summed in fp32; layers without an adapter are as they were."""
    from safetensors.torch import load_file

    base = load_weights(str(small_model))
    adapters = adapters_on(base, r=2, alpha=1, target_modules=("v_proj",))
    for i, p in enumerate(adapters.phi):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    write_merged(tmp_path, base, adapters, load_config("tiny")[1], torch.bfloat16)
    merged = load_file(tmp_path / "model.safetensors")
    phi = iter(adapters.phi)
    for name, p in base.named_parameters():
        expected = p
        if "v_proj" in name:
            A, B = next(phi), next(phi)
            expected = p + 0.5 * B @ A
        assert torch.equal(merged[name], expected.bfloat16()), name
    assert list(phi) == []


def test_an_older_checkpoint_of_an_adapter(tmp_path, process_group):
    """One that knows of nothing trained beside phi."""
    (tmp_path / "state").mkdir()
    adapters = adapters_on(small_llama(torch.float32))
    checkpoint = AdapterCheckpoint(adapters, torch.optim.AdamW(adapters.phi), "base")
    checkpoint.write(tmp_path)
    saved = torch.load(tmp_path / "state" / "adapter.pt")
    start = [p.clone() for p in adapters.phi]
    del saved["beside"]
    torch.save(saved, tmp_path / "state" / "adapter.pt")
    for p in adapters.phi:
        p.fill_(1.0)
    checkpoint.read(tmp_path)
    for p, q in zip(adapters.phi, start, strict=True):
        assert torch.equal(p, q)


def test_a_merged_head_is_a_table_of_its_own(tmp_path, small_model, process_group):
    """Where head and words share one, the adapter of the head must not be lost, nor reach the
    words."""
    from transformers import AutoModelForCausalLM

    base = load_weights(str(small_model)).eval()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    adapters = adapters_on(base, target_modules=("lm_head",))
    adapters.phi[1].copy_(torch.randn(adapters.phi[1].shape, generator=torch.Generator()))
    ids = torch.tensor([[5, 6, 7, 8]])
    adapters.start(1)
    with torch.no_grad():
        expected = base(ids).logits
        assert (expected - load_weights(str(small_model)).eval()(ids).logits).abs().max() > 0.1
        write_merged(tmp_path, base, adapters, load_config("tiny")[1], torch.float32)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_rank_0_alone_writes(tmp_path, small_model, process_group, monkeypatch):
    """Two that write one file spoil it."""
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    (tmp_path / "state").mkdir()
    base = load_weights(str(small_model))
    adapters = adapters_on(base)
    AdapterCheckpoint(adapters, torch.optim.AdamW(adapters.phi), "base").write(tmp_path)
    write_merged(tmp_path / "merged", base, adapters, load_config("tiny")[1], torch.float32)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


# --------------------------------------------------------------------------------------------------
# Losses and counts of a round


@pytest.mark.parametrize("clip", [0.2, 0.6])
def test_inner_clip_is_of_each_task(clip):
    """Between the norms of the tasks: some gradients are cut to it, others stay."""
    episodes, tokens = random_episodes(3, 6, 2)
    learner = lora_learner(small_llama(), tokens, inner_clip=clip)
    phi = learner.adapters.phi
    folded = Folded(list(learner.adapters.layers), tokens)
    steps = meta_lora.support_steps(episodes, 2)
    learner.inner_loop(steps)
    norms = []
    for i, episode in enumerate(episodes):
        phi_i = [p.clone().requires_grad_() for p in phi]
        optimizer = torch.optim.SGD(phi_i, lr=0.02)
        for examples in chunks(episode.support, 2):
            optimizer.zero_grad()
            folded.loss(phi_i, examples).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(phi_i, clip).item())
            optimizer.step()
        for p, q in zip(learner.adapters.stack, phi_i, strict=True):
            torch.testing.assert_close(p[i], q, rtol=1e-7, atol=1e-9)
    assert max(norms) > clip


def test_inner_steps_by_hand():
    """Adam's from the first on, with gradients as small as its epsilon; clipping by the norm and
    1e-6, of each task."""
    adapters = adapters_on(small_llama(), r=1, target_modules=("k_proj",))
    adapters.phi = [torch.zeros(1, 2, dtype=torch.float64) for _ in range(4)]
    args = meta_lora.Args(inner_lr=0.5, betas=(0.8, 0.9))
    learner = meta_lora.AdapterLearner(None, adapters, args, World(torch.device("cpu")), 0, {})
    adapters.start(2)
    learner.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in adapters.stack]
    expected = [torch.zeros(2, 1, 2, dtype=torch.float64) for _ in range(4)]
    adam = torch.optim.Adam(expected, lr=0.5, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(0)
    for t in (1, 2, 3):
        for p, q in zip(adapters.stack, expected, strict=True):
            q.grad = 1e-8 * torch.randn(2, 1, 2, generator=generator).double()
            p.grad = q.grad.clone()
        adam.step()
        learner.inner_step(t)
        for p, q in zip(adapters.stack, expected, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=0)
            assert p.grad is None

    args = meta_lora.Args(inner_lr=0.5, inner_optimizer="sgd", inner_clip=3e-6)
    learner = meta_lora.AdapterLearner(None, adapters, args, World(torch.device("cpu")), 0, {})
    adapters.start(2)
    for i, p in enumerate(adapters.stack):  # norms 5e-6 and 1e-6: factors 3 / (5 + 1) and 1
        p.grad = torch.zeros(2, 1, 2, dtype=torch.float64)
        if i < 2:
            p.grad[0, 0, i] = (3e-6, 4e-6)[i]
    adapters.stack[3].grad[1, 0, 0] = 1e-6
    learner.inner_step(1)
    changes = [(p.detach() * 1e6).round(decimals=9).tolist() for p in adapters.stack]
    still = [[[0, 0]], [[0, 0]]]
    expected = [[[[-0.75, 0]], [[0, 0]]], [[[0, -1]], [[0, 0]]], still, [[[0, 0]], [[-0.5, 0]]]]
    assert changes == expected


def test_tasks_take_equally_many_steps():
    """Others are refused: they could not run together."""
    episodes, _ = random_episodes(2, 6, 2)
    episodes[1] = replace(episodes[1], support=episodes[1].support[:4])
    with pytest.raises(ValueError, match="shorter"):
        meta_lora.support_steps(episodes, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_frozen_and_whole(checkpointing, process_group):
    """One process has nothing to shard, two have; recomputed activations give the adapters the same
    gradient."""
    config, _ = load_config("tiny")
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    args = meta_lora.Args(activation_checkpointing=checkpointing)
    model = meta_lora.build(args, config, world)
    assert not any(isinstance(m, FSDPModule) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    adapters = meta_lora.add_adapters(args, model, world)
    assert adapters.scale == 2.0
    assert adapters.phi[0].shape == (16, 128)
    adapters.start(1)
    model(torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    norms = [p.grad.norm().item() for p in adapters.stack[1::2]]
    assert len(norms) == 35
    assert min(norms) > 0
    world = World(torch.device("cpu"), size=2, mesh=one_rank_mesh())
    model = meta_lora.build(args, config, world)
    assert sum(isinstance(m, FSDPModule) for m in model.modules()) == 6


def test_losses_of_a_joint_round():
    """Of each task the means of its last support batch and of its query rows, at phi; before
    adaptation the query loss alone."""
    episodes, tokens = random_episodes(3, 4, 3)
    learner = lora_learner(small_llama(), tokens)
    folded = Folded(list(learner.adapters.layers), tokens)

    def means(batches: list) -> torch.Tensor:
        return torch.stack([folded.loss(learner.adapters.phi, rows) for rows in batches])

    support, query = learner.joint(learner.union_tokens(episodes), episodes)
    torch.testing.assert_close(support, means([e.support[2:] for e in episodes]))
    torch.testing.assert_close(query, means([e.query for e in episodes]))
    torch.testing.assert_close(learner.query_losses(episodes), means([e.query for e in episodes]))
    history = learner.inner_loop(meta_lora.support_steps(episodes, 2))
    assert history.shape == (2, 3)
    torch.testing.assert_close(history[0], means([e.support[:2] for e in episodes]))


@pytest.mark.parametrize("method", ["fomaml", "reptile"])
def test_a_rounds_support_loss_is_the_last_steps(method):
    """The loss of the last support batch, before the step on it."""
    episodes, tokens = random_episodes(2, 4, 3)
    learner = lora_learner(small_llama(), tokens, tasks_per_step=2, inner_lr=0.05)
    history = learner.inner_loop(meta_lora.support_steps(episodes, 2))
    support, _ = getattr(learner, method)(episodes)
    torch.testing.assert_close(support, history[-1])
    assert (history[-1] - history[0]).abs().min() > 1e-3


@pytest.mark.parametrize("method", ["reptile", "joint"])
def test_parts_of_groups_add_up(method):
    """Tasks one at a time make the round that all together make."""
    episodes, tokens = random_episodes(3, 4, 2)
    learner = lora_learner(small_llama(), tokens)
    one_group = getattr(learner, method)
    if method == "joint":
        one_group = partial(one_group, learner.union_tokens(episodes))
    whole, losses = meta_gradient(learner, one_group, episodes)
    parts, same = meta_gradient(learner, one_group, episodes, together=1)
    torch.testing.assert_close(losses, same)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("method", ["fomaml", "reptile", "joint"])
def test_tokens_of_a_round_are_counted(method):
    """All rows once, prompts too."""
    episodes, tokens = random_episodes(2, 4, 3)
    learner = lora_learner(small_llama(), tokens, tasks_per_step=2)
    if method == "joint":
        learner.joint(1, episodes)
    else:
        getattr(learner, method)(episodes)
    seen = sum(len(tokens[e.id].ids) for e in all_rows(episodes))
    assert learner.tokens_seen == seen
    learner.query_losses(episodes)  # measures only: its forward passes are not of the round
    assert learner.tokens_seen == seen


def test_back_to_phi():
    episodes, tokens = random_episodes(1, 4, 2)
    learner = lora_learner(small_llama(), tokens)
    learner.adapt(episodes[0].support, lambda k: None)
    assert not torch.equal(learner.adapters.stack[1][0], learner.adapters.phi[1])
    learner.restore()
    for p, phi in zip(learner.adapters.stack, learner.adapters.phi, strict=True):
        assert torch.equal(p, phi[None])


# --------------------------------------------------------------------------------------------------
# The script: defaults, checks, the numbers of its loop


def test_defaults_of_the_demonstration():
    """What the figures in README.md and docs/meta_lora.md were measured with."""
    assert asdict(meta_lora.Args()) == {
        "model": "tiny", "data": "ciphers", "task_column": None, "heldout_subjects": (),
        "support_ratio": 0.3, "query_ratio": 0.4, "max_length": 2048,
        "output_dir": "runs/meta_lora", "seed": 42,
        "lora_r": 16, "alpha": 32, "dropout": 0.0, "rank_stabilised": False,
        "target_modules": (
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        ),
        "meta_gradient": "fomaml", "inner_steps": 5, "inner_lr": 5e-3, "inner_optimizer": "adam",
        "inner_clip": 0.0, "shots": 30, "support_batch": 30, "query_batch": 20,
        "tasks_per_step": 4, "tasks_per_forward": 0, "steps": 120, "outer_lr": 2e-3,
        "warmup_ratio": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.01, "clip": 1.0,
        "reptile_epsilon": 0.5,
        "eval_every": 60, "eval_problems": 20, "eval_tasks": 10, "eval_max_new_tokens": 12,
        "eval_curve": True, "gain_every": 10, "save_every": 60, "keep": 5, "merge": False,
        "resume": False, "dry_run": False, "wandb": False, "push_to_hub": None,
        "activation_checkpointing": False, "trust_remote_code": False,
    }  # fmt: skip
    assert meta_lora.Args().replicas == 1


def test_rounds_that_cannot_be_shared():
    for options, ranks, message in (
        ({"tasks_per_step": 4}, 2, None),
        ({"tasks_per_step": 4}, 4, None),
        ({"tasks_per_step": 2}, 4, "--tasks-per-step 2 cannot be shared equally by the 4 ranks"),
        ({"tasks_per_step": 4}, 3, "--tasks-per-step 4 cannot be shared equally by the 3 ranks"),
        ({"shots": 30, "support_batch": 30}, 1, None),
        ({"shots": 0, "support_batch": 31}, 1, None),
        (
            {"shots": 1, "support_batch": 2},
            1,
            "--support-batch 2 is more than the --shots 1 of an episode",
        ),
        (
            {"shots": 30, "support_batch": 31},
            1,
            "--support-batch 31 is more than the --shots 30 of an episode",
        ),
    ):
        if message is None:
            meta_lora.check(meta_lora.Args(**options), ranks)
            continue
        with pytest.raises(DataError, match=f"^{message}$"):
            meta_lora.check(meta_lora.Args(**options), ranks)


@pytest.mark.parametrize("merge", [False, True])
def test_what_a_dry_run_says(merge, monkeypatch, capsys):
    """Rows of a round times the mean length; disk for the merged model alone."""
    rows = [Example("", "", "", "", 0, str(i)) for i in range(6)]
    tokens = {"0": Encoded([0] * 10, 4), "1": Encoded([0] * 30, 4)}
    tasks = [Task("one", rows[:3], rows[3:5], rows[5:])]
    asked = []
    monkeypatch.setattr(meta_lora, "prepare", lambda *_: (None, None, tasks, tasks, tokens))
    monkeypatch.setattr(meta_lora, "needs", lambda *_: "needs")
    monkeypatch.setattr(meta_lora, "check_space", lambda *args: asked.append(args) or ["reason"])
    args = meta_lora.Args(
        tasks_per_step=3, inner_steps=5, support_batch=4, query_batch=7, merge=merge
    )
    world = World(torch.device("cpu"))
    assert meta_lora.examine(args, world) == ["reason"]
    assert asked == [(world, "needs", "runs/meta_lora", int(merge))]
    assert capsys.readouterr().out == (
        "  one: 3 support, 2 query, 1 test\n"
        "about 1,620 tokens per step; mean sequence 20, longest 30\n"
    )


def test_positions_that_are_asked_for(sums, monkeypatch):
    args = meta_lora.Args(data=str(sums), support_batch=3, query_batch=3)
    world = World(torch.device("cpu"))
    tokens = meta_lora.prepare(args, world)[-1]
    longest = max(len(row.ids) for row in tokens.values())
    asked = []
    monkeypatch.setattr(meta_lora, "check_positions", lambda _, *args: asked.append(args))
    meta_lora.prepare(args, world)
    assert asked == [(longest, "--max-length")]


def test_numbers_of_a_run(small_model, sums, tmp_path, capsys, monkeypatch, counted):
    """The schedule, which rounds measure the gain and which evaluations the curve, the tokens and
    FLOPs of a round, what is said of the sizes."""
    monkeypatch.setattr(plots, "figure", lambda *_: None)
    flags = ["--model", small_model, "--data", sums, *META_RUN]
    flags += ["--eval-every", "2", "--gain-every", "3"]
    flags += ["--lora-r", "2", "--target-modules", "k_proj", "--outer-lr", "1e-3"]
    assert run_here(meta_lora, *flags, "--output-dir", tmp_path / "r") == 0
    base = load_weights(str(small_model)).num_parameters()
    said = f"0.00M adapter parameters on 2 layers of a base of {base / 1e6:.1f}M, 1 rank(s)"
    assert f"fomaml: {said}" in capsys.readouterr().out
    rows = logged(tmp_path / "r")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.25e-3])
    assert ["meta/adaptation_gain" in row for row in rows] == [True, False, True, False]
    assert not (tmp_path / "r" / "merged").exists()
    evaluations = logged(tmp_path / "r", "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    for row, points in zip(evaluations, (3, None, 3), strict=True):
        assert len(row["tasks"]) == 2
        for numbers in row["tasks"].values():
            assert numbers["problems"] == 2
            assert len(numbers.get("steps", ())) == (points or 0)
    args = meta_lora.Args(data=str(sums), support_batch=2, query_batch=3, shots=0)
    _, _, tasks, _, tokens = meta_lora.prepare(args, World(torch.device("cpu")))
    for step, (count, flops) in enumerate(counted):
        assert flops == 4 * base
        if step in (1, 3):  # without the measurement of the gain
            episodes = [sample_episode(tasks, 42, step, place, 4, 3) for place in range(2)]
            assert count == sum(len(tokens[e.id].ids) for e in all_rows(episodes))


@pytest.mark.parametrize(
    "flags,measured",
    [
        (["--gain-every", "1"], [True] * 4),
        (["--gain-every", "2"], [True, True, False, True]),
        (["--gain-every", "0"], [False] * 4),
        (["--gain-every", "1", "--meta-gradient", "joint"], [False] * 4),
    ],
)
def test_rounds_that_measure_the_gain(flags, measured, small_model, sums, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "figure", lambda *_: None)
    settings = ["--model", small_model, "--data", sums, *META_RUN, "--eval-every", "-1", *flags]
    assert run_here(meta_lora, *settings, "--output-dir", tmp_path / "r") == 0
    assert ["meta/adaptation_gain" in row for row in logged(tmp_path / "r")] == measured


def test_no_training(small_model, sums, tmp_path, monkeypatch):
    """The evaluation alone, once, with its curve."""
    monkeypatch.setattr(plots, "figure", lambda *_: None)
    settings = ["--model", small_model, "--data", sums, *META_RUN, "--meta-gradient", "none"]
    assert run_here(meta_lora, *settings, "--output-dir", tmp_path / "r") == 0
    assert logged(tmp_path / "r") == []
    (row,) = logged(tmp_path / "r", "evaluations.jsonl")
    assert row["step"] == 0
    for numbers in row["tasks"].values():
        assert len(numbers["steps"]) == 3


def test_rates_that_are_warned_of(small_model, sums, tmp_path, capsys, monkeypatch):
    """From 2e-3 on, both, where another model than an embedded one is trained."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(meta_lora, "build", interrupted)
    for outer, inner in ((2e-3, 1.9e-3), (1.9e-3, 2e-3)):
        rates = ["--outer-lr", outer, "--inner-lr", inner]
        where = ["--model", small_model, "--output-dir", tmp_path / f"{outer}"]
        rows = ["--data", sums, "--support-batch", "4", "--query-batch", "4"]
        assert run_here(meta_lora, *rows, *rates, *where) == 130
        name = "outer" if outer == 2e-3 else "inner"
        warnings = [w for w in capsys.readouterr().out.splitlines() if w.startswith("warning")]
        assert warnings == [
            f"warning: --{name}-lr 0.002 is a rate for the embedded models: a real one wants less "
            "than 0.002, or its weights are lost"
        ]


# --------------------------------------------------------------------------------------------------
# What is asked of the parts, with settings that are all other than their defaults


def test_what_may_differ_on_resume():
    """Nothing that changes the mathematics, the seed or the data."""
    assert set(meta_lora.FREE) == {
        "resume", "output_dir", "wandb", "push_to_hub", "save_every", "keep", "eval_every",
        "eval_problems", "eval_tasks", "eval_max_new_tokens", "eval_curve", "gain_every",
        "tasks_per_forward", "activation_checkpointing", "dry_run", "merge",
    }  # fmt: skip


# Flags, the values at the ends that are taken, and those just outside
ENDS = [
    ("lora_r inner_steps support_batch query_batch tasks_per_step steps keep save_every max_length",
     (1, 10**9), (0, 10**9 + 1)),
    ("eval_problems", (1, 10**9), (0, 10**9 + 1)),
    ("shots eval_tasks eval_max_new_tokens gain_every tasks_per_forward",
     (0, 10**9), (-1, 10**9 + 1)),
    ("eval_every", (-1, 0, 10**9), (-2, 10**9 + 1)),
    ("inner_lr outer_lr", (1e-9, 100.0), (0.0, -1.0, 100.1)),
    ("alpha", (1e-9, 1e6), (0, 1e6 + 1)),
    ("clip", (1e-9, 1e300), (0.0, math.inf, math.nan)),
    ("inner_clip", (0.0, 1e300), (-1e-9, math.inf)),
    ("reptile_epsilon", (1e-9, 10.0), (0.0, 10.1)),
    ("weight_decay", (0.0, 10.0), (-1e-9, 10.1)),
    ("warmup_ratio", (0.0, 1.0), (-1e-9, 1.0 + 1e-9)),
    ("support_ratio query_ratio", (1e-9, 1.0), (0.0, 1.0 + 1e-9)),
    ("betas", ((0.0, 0.999), (0.999, 0.0)), ((0.9, 1.0), (1.0, 0.9), (-0.1, 0.9))),
    ("dropout", (0.0, 0.999), (-1e-9, 1.0)),
    ("seed", (-8 * 10**18, 0, 8 * 10**18), (-(10**19), 10**19)),
]  # fmt: skip


@pytest.mark.parametrize("names,taken,refused", ENDS, ids=str)
def test_ends_of_the_intervals(names, taken, refused):
    small = {"shots": 0, "support_batch": 1, "tasks_per_step": 1}
    for name in names.split():
        for value in taken:
            meta_lora.check(meta_lora.Args(**small | {name: value}), 1)
        for value in refused:
            with pytest.raises(DataError, match=f"--{name.replace('_', '-')} must be"):
                meta_lora.check(meta_lora.Args(**small | {name: value}), 1)


OTHERS = {
    "model": "some/base", "data": "some.jsonl", "task_column": "topic", "heldout_subjects": ("x",),
    "support_ratio": 0.2, "query_ratio": 0.6, "max_length": 99, "seed": 7, "lora_r": 5,
    "alpha": 3, "dropout": 0.25, "target_modules": ("k_proj",), "rank_stabilised": True,
    "inner_steps": 3, "shots": 11, "support_batch": 4, "query_batch": 6, "eval_tasks": 9,
    "trust_remote_code": True,
}  # fmt: skip


def recorded(monkeypatch, results: dict) -> dict[str, tuple]:
    """Replaces functions of meta_lora.py: what each is called with, by name, defaults too."""
    calls = {}
    for name, result in results.items():
        signature = inspect.signature(getattr(meta_lora, name))

        def stub(*args, signature=signature, name=name, result=result, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.setdefault(name, []).append(bound.arguments)
            return result

        monkeypatch.setattr(meta_lora, name, stub)
    return calls


def test_what_is_prepared(monkeypatch, capsys):
    """The targets are looked at, tasks are split and cut as asked for; the report is said."""
    prepared = (["train"], ["test"], {"0": Encoded([0] * 9, 4)}, "what there is")
    results = {
        "load_config": ("config", "tokenizer"), "skeleton": "base", "check_targets": None,
        "load_tasks": ["tasks"], "episode_tasks": prepared, "check_positions": None,
    }  # fmt: skip
    calls = recorded(monkeypatch, results)
    world = World(torch.device("cpu"))
    found = meta_lora.prepare(meta_lora.Args(**OTHERS), world)
    assert found == ("config", "tokenizer", *prepared[:3])
    assert capsys.readouterr().out == "what there is\n"
    (asked,) = calls["load_config"]
    assert asked == {"name": "some/base", "trust_remote_code": True}
    (asked,) = calls["skeleton"]
    assert (asked["config"], asked["trust_remote_code"]) == ("config", True)
    assert calls["check_targets"] == [{"model": "base", "target_modules": ("k_proj",)}]
    assert calls["load_tasks"] == [
        {
            "data": "some.jsonl", "task_column": "topic", "heldout": ("x",), "max_samples": 0,
            "support_ratio": 0.2, "query_ratio": 0.6, "seed": 7,
        }
    ]  # fmt: skip
    assert calls["episode_tasks"] == [
        {
            "tokenizer": "tokenizer", "tasks": ["tasks"], "max_length": 99, "steps": 3,
            "support": 4, "query": 6, "evaluated": 9, "limit": "--max-length", "shots": 11,
        }
    ]  # fmt: skip


def test_what_is_examined(monkeypatch, capsys):
    """The tasks to train on and those held out; the bytes of this run, at its own folder."""
    tokens, rows = {"0": Encoded([0] * 10, 4)}, [Example("", "", "", "", 0, "0")]
    train = [Task("one", rows, rows, rows), Task("two", rows, rows, rows)]
    heldout = [Task("three", rows, [], rows * 2, heldout=True)]
    results = {
        "prepare": ("config", None, train, heldout, tokens), "needs": "bytes", "check_space": [],
    }  # fmt: skip
    calls = recorded(monkeypatch, results)
    args, world = meta_lora.Args(output_dir="elsewhere"), World(torch.device("cpu"))
    assert meta_lora.examine(args, world) == []
    (asked,) = calls["needs"]
    assert asked == {"args": args, "config": "config", "world": world, "tokens": tokens}
    (asked,) = calls["check_space"]
    assert (asked["needs"], asked["output_dir"], asked["have"]) == ("bytes", "elsewhere", None)
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "  one: 1 support, 1 query, 1 test",
        "  two: 1 support, 1 query, 1 test",
        "  three (held out): 1 support, 0 query, 2 test",
    ]


@pytest.mark.parametrize("device,rank", [("cpu", 0), ("cuda", 0), ("cuda", 1)])
def test_what_is_built(device, rank, monkeypatch):
    """bf16 on a GPU; rank 0 alone reads the weights; the head is looked at."""
    base = small_llama(torch.float32)
    calls = recorded(
        monkeypatch,
        {"load_weights": "source", "skeleton": base, "materialize": None, "check_head": None},
    )
    world = World(torch.device(device), rank=rank)
    args = meta_lora.Args(**OTHERS, activation_checkpointing=device == "cuda")
    assert meta_lora.build(args, "config", world) is base
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device]
    read = {"name": "some/base", "dtype": dtype, "trust_remote_code": True}
    assert calls.get("load_weights", []) == [read] * (rank == 0)
    (asked,) = calls["skeleton"]
    assert (asked["config"], asked["dtype"]) == ("config", dtype)
    assert asked["trust_remote_code"]
    source = "source" if rank == 0 else None
    assert calls["materialize"] == [{"model": base, "source": source, "device": world.device}]
    assert calls["check_head"] == [{"model": base, "world": world}]
    recomputed = {m.gradient_checkpointing for m in layers_to_shard(base)}
    assert recomputed == {device == "cuda"}


def test_the_adapter_is_as_asked_for():
    model = small_llama(torch.float32)
    adapters = meta_lora.add_adapters(meta_lora.Args(**OTHERS), model, World(torch.device("cpu")))
    assert [name.split(".")[-1] for name in adapters.layers] == ["k_proj"] * 2
    assert adapters.scale == pytest.approx(3 / math.sqrt(5))
    assert adapters.dropout == 0.25
    assert adapters.phi[0].shape == (5, 32)
    same = adapters_on(small_llama(torch.float32), r=5, seed=7, target_modules=("k_proj",))
    assert torch.equal(adapters.phi[0], same.phi[0])


# --------------------------------------------------------------------------------------------------
# The loop alone: small tasks, a small model, and groups of tasks whose gradient is given


class Loop:
    """meta_lora.main with what it reads replaced; what a step logs, and what each group saw.

    gradient(step) is added to every number of the meta-gradient by each group. Of a task numbered
    i the support loss is 10 + i, the query loss i, the one before adaptation i + 5.
    """

    def __init__(self, monkeypatch, folder: Path):
        episodes, self.tokens = random_episodes(5, 8, 6)
        self.tasks = [Task(e.task, e.support, e.query[2:], e.query[:2]) for e in episodes]
        self.folder, self.logged, self.groups, self.reduced = folder, [], [], 1
        self.gradient, self.losses, self.model = lambda step: 1.0, 0.0, small_llama(torch.float32)
        loop = self
        config, tokenizer = load_config("tiny")
        prepared = (config, tokenizer, self.tasks, self.tasks[:2], self.tokens)
        monkeypatch.setattr(meta_lora, "prepare", lambda *_: prepared)
        monkeypatch.setattr(meta_lora, "build", lambda *_: loop.model.requires_grad_(False))
        monkeypatch.setattr(plots, "figure", lambda *_: None)
        log, all_reduce = run.Run.log, dist.all_reduce

        def noted(self, step, metrics, tokens=0, flops_per_token=0):
            loop.logged.append(metrics | {"tokens": tokens})
            log(self, step, metrics, tokens, flops_per_token)

        def summed(x, *op, **group):  # as if the other ranks had the same numbers
            all_reduce(x, *op, **group)
            if not op:
                x.mul_(loop.reduced)

        def group(learner, method, episodes, union=None):
            seen = {
                "method": method, "episodes": episodes, "union": union,
                "dropout": learner.adapters.training, "seed": torch.initial_seed(),
            }  # fmt: skip
            loop.groups.append(seen)
            learner.tokens_seen += 100
            for g in learner.meta_gradient:
                g.add_(loop.gradient(len(loop.logged)))
            numbers = loop.numbers(episodes)
            return numbers + 10 + loop.losses, numbers

        def before(learner, episodes):
            assert not learner.adapters.training
            return loop.numbers(episodes) + 5

        monkeypatch.setattr(run.Run, "log", noted)
        monkeypatch.setattr(dist, "all_reduce", summed)
        learner = meta_lora.AdapterLearner
        monkeypatch.setattr(learner, "query_losses", before)
        monkeypatch.setattr(learner, "fomaml", lambda self, e: group(self, "fomaml", e))
        monkeypatch.setattr(learner, "reptile", lambda self, e: group(self, "reptile", e))
        monkeypatch.setattr(learner, "joint", lambda self, u, e: group(self, "joint", e, u))

    def numbers(self, episodes) -> torch.Tensor:
        return torch.tensor([float(e.task.removeprefix("task")) for e in episodes])

    def run(self, rank: int = 0, size: int = 1, **settings) -> int:
        defaults = {
            "steps": 1, "inner_steps": 3, "support_batch": 2, "query_batch": 3, "shots": 5,
            "lora_r": 2, "target_modules": ("k_proj",), "tasks_per_step": 4, "eval_every": -1,
            "clip": 1e9, "weight_decay": 0.0, "seed": 7, "output_dir": str(self.folder / "run"),
        }  # fmt: skip
        world = World(CPU, rank=rank, size=size, mesh=one_rank_mesh())
        with pytest.MonkeyPatch.context() as patch:
            if rank:  # which rank 0 tells the name of the folder
                patch.setattr(run, "run_folder", lambda *_: self.folder)
            return meta_lora.main(meta_lora.Args(**defaults | settings), world)

    def episodes(self, step: int) -> list:
        """Of all places of a round: six rows of five different ones."""
        return [sample_episode(self.tasks, 7, step, place, 6, 3, 5) for place in range(4)]

    def B(self) -> float:
        """The one number of every B at the end, where it was 0 at the start."""
        adapter = final_weights(self.folder / "run")
        (value,) = torch.cat([w.flatten() for n, w in adapter.items() if "lora_B" in n]).unique()
        return value.item()


@pytest.fixture
def loop(monkeypatch, tmp_path, process_group):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Loop(monkeypatch, tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "rank,together,places",
    [(0, 0, [[0, 1]]), (1, 0, [[2, 3]]), (1, 1, [[2], [3]])],
)
def test_the_part_of_a_rank(rank, together, places, loop):
    """Its places of the round, as many at a time as asked for, with dropout; sums over the ranks,
    which here have the same numbers, and tokens of all of them."""
    loop.reduced = 3
    assert loop.run(rank, 2, tasks_per_forward=together) == 0
    expected = loop.episodes(0)
    assert [g["episodes"] for g in loop.groups] == [[expected[i] for i in p] for p in places]
    assert all(g["dropout"] for g in loop.groups)
    (row,) = loop.logged
    for place, episode in enumerate(expected):
        mine = 3.0 * (place // 2 == rank)
        i = float(episode.task.removeprefix("task"))
        assert row[f"{episode.task}/query_loss"] == mine * i
        assert row[f"{episode.task}/support_loss"] == mine * (10 + i)
        assert row[f"{episode.task}/adaptation_gain"] == mine * 5
    size = 2 * 2 * (32 + 16)  # two layers k_proj of rank 2
    assert row["meta/grad_norm"] == pytest.approx(3 * len(places) * math.sqrt(size))
    assert row["tokens"] == len(places) * 100 * 2


def test_dropout_of_a_round_is_its_own(loop):
    """Another of every round, rank and seed; of a resumed round the same."""
    found = []
    for rank, seed in ((0, 7), (1, 7), (0, 8), (0, 7)):
        loop.groups.clear()
        loop.run(rank, 2, steps=3, seed=seed)
        found.append([g["seed"] for g in loop.groups])
    assert found[3] == found[0]
    assert len({number for numbers in found[:3] for number in numbers}) == 9


def test_a_joint_round_is_a_mean_over_all_ranks(loop):
    """Over the tokens of every task's rows, also of those of other ranks."""
    loop.run(1, 2, meta_gradient="joint")
    (group,) = loop.groups
    rows = [loop.tokens[e.id] for e in all_rows(loop.episodes(0))]
    assert group["union"] == sum(len(row.ids) - row.prompt_length for row in rows)


def test_reptiles_step_by_hand(loop):
    """phi moves by epsilon times schedule times direction: 0.25 (1 + 1 + 1/2) x 1."""
    assert loop.run(meta_gradient="reptile", steps=3, reptile_epsilon=0.25) == 0
    assert {g["method"] for g in loop.groups} == {"reptile"}
    assert loop.B() == pytest.approx(0.625)


def test_stage_two_has_its_betas(loop):
    """Two steps at rates 0.05 and 0.1 with gradients 1 and -2: with betas (1/2, 1/4) the second's
    moments are -1 and 3.4."""
    loop.gradient = lambda step: (1.0, -2.0)[step]
    loop.run(steps=2, warmup_ratio=1.0, outer_lr=0.1, betas=(0.5, 0.25))
    assert loop.B() == pytest.approx(-0.05 + 0.1 / math.sqrt(3.4), rel=1e-4)


@pytest.mark.parametrize("what", ["gradient", "losses"])
@pytest.mark.parametrize("method", ["fomaml", "reptile"])
def test_a_round_that_is_not_finite(method, what, loop):
    """phi stays, the round is counted."""
    if what == "losses":
        loop.losses = math.nan
    else:
        loop.gradient = lambda step: math.nan
    assert loop.run(meta_gradient=method) == 0
    assert loop.B() == 0
    (row,) = logged(loop.folder / "run")
    assert row["skipped_steps"] == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_a_round_that_is_broken_off(stopped, loop):
    """No further group of tasks, no step on half a gradient, no merged model."""

    asked = [signal.SIGTERM] * stopped  # once: a second one ends the process

    def gradient(step):
        if asked:
            signal.raise_signal(asked.pop())
        return 1.0

    loop.gradient = gradient
    loop.model = load_weights("tiny")
    assert loop.run(tasks_per_forward=1, merge=True) == 0
    assert len(loop.groups) == (1 if stopped else 4)
    assert len(loop.logged) == (0 if stopped else 1)
    assert (loop.B() == 0) == stopped
    assert (loop.folder / "run" / "merged").exists() != stopped


@pytest.mark.parametrize("curve", [False, True])
def test_what_is_evaluated(curve, loop, monkeypatch):
    """With the flags' own numbers, at phi, with the seed's dropout; the curve at the first and the
    last one alone."""
    result = {"task0": {"loss_before": 2.0, "loss_after": 1.0, "problems": 2}}
    seeds = []

    def adaptation(*args, **asked):
        seeds.append(torch.initial_seed())
        calls.append((args, asked))
        return result

    calls = []
    monkeypatch.setattr(meta_lora, "adaptation", adaptation)
    settings = {"eval_every": 1, "max_length": 99, "eval_problems": 8, "eval_max_new_tokens": 6}
    loop.run(steps=2, eval_curve=curve, **settings)
    assert seeds == [7] * 3
    assert [asked["curve"] for _, asked in calls] == ([3, 0, 3] if curve else [0] * 3)
    for args, asked in calls:
        assert args[:3] == (loop.model, loop.tasks[:2], loop.tokens)
        names = ("max_length", "problems", "max_new_tokens", "seed")
        assert [asked[name] for name in names] == [99, 8, 6, 7]
        rows = asked["draw"](random.Random("x"), loop.tasks[0].support)
        assert rows == draw_support(random.Random("x"), loop.tasks[0].support, 6, 5)
    evaluations = logged(loop.folder / "run", "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert evaluations[0]["mean"] == {"loss_before": 2.0, "loss_after": 1.0}


def test_what_a_run_says_and_writes(loop, capsys):
    """The sizes, the numbers beside the progress bar, where the base is."""
    loop.model = load_weights("tiny")
    assert loop.run(lora_r=8, target_modules=("q_proj", "down_proj")) == 0
    said = capsys.readouterr()
    base = sum(p.numel() for p in load_weights("tiny").parameters())
    targets = [m for n, m in loop.model.named_modules() if n.endswith(("q_proj", "down_proj"))]
    size = sum(8 * sum(m.weight.shape) for m in targets)
    assert f"{size / 1e6:.2f}M adapter parameters on {len(targets)} layers" in said.out
    assert f"of a base of {base / 1e6:.1f}M" in said.out
    mean = loop.numbers(loop.episodes(0)).mean().item()
    assert f"query={mean:.3f}, gain=5.000, tok_s=" in said.err
    written = json.loads((loop.folder / "run" / "checkpoint" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(ROOT / "tiny" / "models" / "tiny")
    assert written["r"] == 8

"""meta_lora.py and lora.py: both stages against independent computations; files; ranks; time."""

import math

import pytest
import torch

import bench
import meta_lora
from data import response_tokens
from lora import Adapters, dropout, write_adapter, write_merged
from model import World, load_config, load_weights
from tests.helpers import (
    all_rows,
    assert_same_weights,
    chunks,
    final_weights,
    functional,
    logged,
    random_episodes,
    reference_loss,
    run_here,
    run_well,
    small_llama,
    weights_of,
)

NEEDS_PEFT = "peft is not installed; .ci/run installs it for this test"
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

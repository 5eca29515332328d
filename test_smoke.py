"""The tests of a minute: `pytest test_smoke.py`.

The first steps of each script by its command line, each stopped and resumed, and the gradient of
each algorithm against an independent computation. All else is in tests/: `pytest`.
"""

import copy
import math
import shutil

import pytest
import torch
import torch.distributed as dist

import amft
import fomaml
import meta_lora
from learner import PolicyLearner
from lora import Adapters
from model import World
from policy import Policy
from tests.helpers import (
    assert_same_weights,
    chunks,
    final_weights,
    functional,
    logged,
    meta_gradient,
    one_rank_mesh,
    random_episodes,
    reference_loss,
    run_here,
    run_well,
    save_small_model,
    small_llama,
    weights_of,
)

CPU = torch.device("cpu")
SGD_RATE = 0.05


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are no faster with two, and much slower where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smoke_model(tmp_path_factory):
    """A folder with a random Llama of 60k parameters and the embedded tokenizer."""
    return save_small_model(tmp_path_factory.mktemp("smoke"))


# --------------------------------------------------------------------------------------------------
# First steps, by the command line

META_STEPS = [
    "--data", "changes",
    "--steps", "4", "--save-every", "2", "--inner-steps", "2", "--tasks-per-step", "2",
    "--support-batch", "2", "--query-batch", "2", "--gain-every", "2", "--eval-every", "2",
    "--eval-problems", "4", "--eval-tasks", "2", "--eval-max-new-tokens", "4",
]  # fmt: skip
# Its last step, number 12, has a meta-gradient
AMFT_STEPS = [
    "--steps", "12", "--save-every", "6", "--warmup-steps", "1", "--mu-every", "12",
    "--prompts-per-step", "4", "--samples", "4", "--max-new-tokens", "32", "--eval-every", "0",
    "--eval-problems", "4", "--validation-prompts", "8", "--validation-size", "8", "--show", "1",
]  # fmt: skip


def assert_resumes(script, settings: list, folder) -> None:
    """The last checkpoint of a finished run is taken away: --resume makes it again, bit for bit."""
    names = [n for n in ("metrics.jsonl", "evaluations.jsonl") if (folder / n).exists()]
    rows, weights = [logged(folder, name) for name in names], final_weights(folder)
    last = max(folder.glob("step-*"))
    shutil.rmtree(last)
    (folder / "checkpoint").unlink()
    assert run_here(script, *settings, "--output-dir", folder, "--resume") == 0
    assert (folder / "checkpoint").resolve() == last
    assert_same_weights(final_weights(folder), weights)
    assert [logged(folder, name) for name in names] == rows


def test_fomaml_first_steps(smoke_model, tmp_path, capsys):
    settings = ["--model", smoke_model, *META_STEPS]
    folder = tmp_path / "r"
    assert run_here(fomaml, *settings, "--output-dir", folder) == 0
    assert "mean of tasks" in capsys.readouterr().out
    rows = logged(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert math.isfinite(row["meta/loss"])
        assert row["meta/grad_norm"] > 0
    assert [row["step"] for row in logged(folder, "evaluations.jsonl")] == [0, 2, 4]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert_resumes(fomaml, settings, folder)


def test_learned_rates_resume(smoke_model, tmp_path):
    settings = ["--model", smoke_model, *META_STEPS, "--learn-inner-lr", "tensor"]
    settings += ["--eval-every", "-1"]
    assert run_here(fomaml, *settings, "--output-dir", tmp_path / "r") == 0
    rows = logged(tmp_path / "r")
    assert rows[-1]["inner_lr/lowest"] < rows[0]["inner_lr/lowest"]
    assert_resumes(fomaml, settings, tmp_path / "r")


@pytest.mark.parametrize("method", ["reptile", "maml", "joint", "in_context"])
def test_other_meta_gradients_run(method, smoke_model, tmp_path):
    settings = ["--model", smoke_model, *META_STEPS, "--steps", "1", "--eval-every", "-1"]
    settings += ["--inner-optimizer", "sgd"] if method == "maml" else []
    where = ["--output-dir", tmp_path / "r"]
    assert run_here(fomaml, *settings, "--meta-gradient", method, *where) == 0
    (row,) = logged(tmp_path / "r")
    assert row["meta/grad_norm"] > 0


def test_meta_lora_first_steps(smoke_model, tmp_path):
    settings = ["--model", smoke_model, *META_STEPS]
    folder = tmp_path / "r"
    assert run_here(meta_lora, *settings, "--output-dir", folder) == 0
    rows = logged(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert math.isfinite(row["meta/loss"])
        assert row["meta/grad_norm"] > 0
    for name, weight in final_weights(folder).items():
        assert weight.abs().max() > 0, f"{name} is as it was at the start"
    assert_resumes(meta_lora, settings, folder)


def test_amft_first_steps(tmp_path):
    folder = tmp_path / "r"
    assert run_here(amft, *AMFT_STEPS, "--output-dir", folder) == 0
    rows = logged(folder)
    assert [row["mu"] for row in rows] == [1.0] + [0.5] * 11
    for row in rows:
        assert row["grad_norm"] > 0
        assert row["loss/sft"] > 0
    assert math.isfinite(rows[-1]["grad_mu"])
    assert (folder / "samples.jsonl").exists()
    assert_resumes(amft, AMFT_STEPS, folder)


def test_environment_test_of_a_shell(smoke_model):
    done = run_well("fomaml.py", "--model", smoke_model, "--dry-run")
    assert "ready" in done.stdout
    assert done.stderr.count("Traceback") == 0


# --------------------------------------------------------------------------------------------------
# The gradient of each algorithm


def test_fomaml_gradient():
    """mean_i grad L_query(theta_i), theta_i by functional_call and plain subtraction."""
    model = small_llama()
    episodes, tokens = random_episodes(2, 4, 3)
    theta = weights_of(model)

    def loss_and_gradient(weights: dict, examples) -> tuple:
        leaves = {name: p.clone().requires_grad_() for name, p in weights.items()}
        rows = [tokens[e.id] for e in examples]
        loss = reference_loss(functional(model, leaves), rows)
        gradient = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), dict(zip(leaves, gradient, strict=True))

    expected = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses = []
    for episode in episodes:
        theta_i = theta
        for examples in chunks(episode.support, 2):
            support_loss, g = loss_and_gradient(theta_i, examples)
            theta_i = {name: p - SGD_RATE * g[name] for name, p in theta_i.items()}
        query_loss, g = loss_and_gradient(theta_i, episode.query)
        for name in expected:
            expected[name] += g[name] / 2
        losses.append([support_loss, query_loss])

    args = fomaml.Args(inner_lr=SGD_RATE, inner_optimizer="sgd", support_batch=2, tasks_per_step=2)
    learner = fomaml.MetaLearner(model, args, World(CPU), 0, tokens)
    got = meta_gradient(learner, learner.fomaml, episodes)
    torch.testing.assert_close(got[:, :2], torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for (name, e), g in zip(expected.items(), learner.meta_gradient, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11, msg=name)
    assert_same_weights(weights_of(model), theta, "theta")


def test_meta_lora_gradient():
    """mean_i grad L_query(phi_i) with the tasks in one forward; the expected one has the adapter
    folded into the weights, W + scale B A, and one task after the other."""
    model, plain = small_llama(), small_llama()
    episodes, tokens = random_episodes(2, 4, 2)
    args = meta_lora.Args(
        inner_lr=SGD_RATE, inner_optimizer="sgd", support_batch=2, tasks_per_step=2
    )
    adapters = Adapters(
        model.requires_grad_(False),
        r=3,
        alpha=6,
        dropout=0.0,
        target_modules=args.target_modules,
        rank_stabilised=False,
        seed=0,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(1)
    phi = [0.2 * torch.randn(p.shape, generator=generator).double() for p in adapters.phi]
    adapters.phi = phi
    weights = weights_of(plain)

    def gradient(adapter: list, examples) -> list:
        leaves = [p.clone().requires_grad_() for p in adapter]
        folded = dict(weights)
        for i, layer in enumerate(adapters.layers):
            change = adapters.scale * leaves[2 * i + 1] @ leaves[2 * i]
            folded[f"{layer}.weight"] = weights[f"{layer}.weight"] + change
        rows = [tokens[e.id] for e in examples]
        return torch.autograd.grad(reference_loss(functional(plain, folded), rows), leaves)

    expected = [torch.zeros_like(p) for p in phi]
    for episode in episodes:
        phi_i = phi
        for examples in chunks(episode.support, 2):
            g = gradient(phi_i, examples)
            phi_i = [p - SGD_RATE * x for p, x in zip(phi_i, g, strict=True)]
        g = gradient(phi_i, episode.query)
        expected = [e + x / 2 for e, x in zip(expected, g, strict=True)]

    learner = meta_lora.AdapterLearner(model, adapters, args, World(CPU), 0, tokens)
    learner.fomaml(episodes)
    for g, e in zip(learner.meta_gradient, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(CPU, mesh=one_rank_mesh())
    dist.destroy_process_group()


@pytest.mark.parametrize("clip", [1e9, 0.5], ids=["unclipped", "clipped"])
def test_amft_derivative_by_mu(clip, one_rank):
    """d theta / d mu of the clipped AdamW step, for every weight, against the central difference of
    the weights after steps with mu + h and mu - h."""
    model = small_llama()
    optimizer = torch.optim.AdamW(
        [{"params": list(model.parameters()), "lr": 3e-3, "peak": 3e-3}], weight_decay=0.1
    )
    args = amft.with_defaults(amft.Args(clip=clip))
    learner = PolicyLearner(args, Policy(model, False), optimizer, one_rank, 0)
    generator = torch.Generator().manual_seed(3)

    def noise() -> list[torch.Tensor]:
        shapes = [p.shape for p in learner.params]
        return [0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    for _ in range(3):  # moments that are not cold
        learner.take_step(noise(), 1.0)
    g_rl, g_sft = noise(), noise()
    D = [s - r for r, s in zip(g_rl, g_sft, strict=True)]
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def step(mu: float) -> tuple:
        """(G, its norm) of a step from the start."""
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        G = [r + mu * d for r, d in zip(g_rl, D, strict=True)]
        return G, learner.take_step(G, 1.0)[0]

    h = 1e-4
    step(0.4 + h)
    above = weights_of(model)
    step(0.4 - h)
    below = weights_of(model)
    G, norm = step(0.4)
    assert (norm > clip) == (clip < 1)
    derivative = [d.clone() for d in D]
    amft.step_derivative(
        optimizer, learner.params, G, derivative, norm, learner.dot(G, D), clip, "adam"
    )
    for d, (name, a), b in zip(derivative, above.items(), below.values(), strict=True):
        torch.testing.assert_close(d, (a - b) / (2 * h), rtol=1e-3, atol=1e-7, msg=name)

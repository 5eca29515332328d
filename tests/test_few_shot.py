"""What is measured of new tasks: after every inner step, and with the examples in the prompt."""

import importlib
import json
import types
from functools import partial

import pytest
import torch

import fomaml
import measure
from data import draw_support, encode, encode_in_context, load_tasks, template
from model import World, load_config, load_weights
from policy import Sample
from tests.helpers import chunks, functional, reference_loss, run_here, weights_of

evaluation = importlib.import_module("eval")  # not the built-in function
NO_STOP = types.SimpleNamespace(agreed=lambda: False, is_requested=lambda: False)


@pytest.mark.parametrize("max_length", [2048, 64])
def test_curve_and_prompts_of_an_evaluation(max_length, small_model, process_group, monkeypatch):
    """Losses after 0 to K steps against torch.optim's; each question is answered at every step, and
    once with the support rows before it, where they fit."""
    _, tokenizer = load_config("tiny")
    tasks = load_tasks("changes")[-2:]
    rows = []
    for task in tasks:
        rows += task.support + task.test
    tokens, _ = encode(tokenizer, rows, 2048)
    asked = []

    def sample(model, tokenizer, prompts, **_):
        asked.extend(tokenizer.batch_decode(prompts))
        return [Sample([], [], False) for _ in prompts]

    monkeypatch.setattr(measure, "sample", sample)
    model = load_weights(str(small_model))
    args = fomaml.Args(inner_steps=3, inner_lr=0.01, support_batch=4)
    learner = fomaml.MetaLearner(model, args, World(torch.device("cpu")), 0, tokens)
    learner.keep()
    supports = []

    def draw(rng, rows):
        supports.append(draw_support(rng, rows, 12, shots=4))
        return supports[-1]

    result = measure.adaptation(
        model, tasks, tokens, tokenizer, World(torch.device("cpu")), adapt=learner.adapt,
        restore=learner.restore, draw=draw, curve=3, max_length=max_length, problems=2,
        max_new_tokens=4, seed=0, stop=NO_STOP,
    )  # fmt: skip
    weights = {n: p.requires_grad_() for n, p in weights_of(model).items()}
    for task, support in zip(tasks, supports, strict=True):
        theta = {n: p.detach().clone().requires_grad_() for n, p in weights.items()}
        optimizer = torch.optim.Adam(theta.values(), lr=0.01)
        losses = []
        for batch in [*chunks(support, 4), None]:
            test = [tokens[e.id] for e in task.test[:2]]
            losses.append(reference_loss(functional(model, theta), test).item())
            if batch:
                optimizer.zero_grad()
                reference_loss(functional(model, theta), [tokens[e.id] for e in batch]).backward()
                optimizer.step()
        numbers = result[task.name]
        assert [step["loss"] for step in numbers["steps"]] == pytest.approx(losses, rel=1e-3)
        assert numbers["loss_before"] == numbers["steps"][0]["loss"]
        assert numbers["loss_after"] == numbers["steps"][3]["loss"]
        assert ("accuracy_in_context" in numbers) == (max_length > 64)
    chat = template(tokenizer)
    in_context = []
    for task, support in zip(tasks, supports, strict=True):
        shown = ""
        for example in dict.fromkeys(support):
            shown += f"{chat.before}{example.prompt}{chat.after}{example.response}<|end|>"
        for example in task.test[:2]:
            question = chat.before + example.prompt + chat.after
            assert asked.count(question) == 8  # both tasks ask the same
            in_context.append(shown + question)
    assert len(asked) == 16 + (4 if max_length > 64 else 0)
    if max_length > 64:
        assert set(in_context) <= set(asked)


def test_all_prompts_must_fit(process_group, monkeypatch):
    """One that is too long, and none is measured: the means of tasks are of the same problems."""
    _, tokenizer = load_config("tiny")
    tasks = [load_tasks(data)[-1] for data in ("changes", "ciphers")]  # prompts of two lengths
    rows = tasks[0].test + tasks[1].test
    tokens, _ = encode(tokenizer, rows, 2048)
    monkeypatch.setattr(measure, "score", lambda *_, **__: None)
    longest = 0
    for task in tasks:
        prompts = encode_in_context(tokenizer, task.support[:4], task.test[:2])
        longest = max(longest, *(len(row.ids) for row in prompts.values()))
    for max_length in (longest, longest - 1):
        result = measure.adaptation(
            None, tasks, tokens, tokenizer, World(torch.device("cpu")), adapt=lambda *_: None,
            restore=lambda: None, draw=lambda rng, rows: rows[:4], curve=2, max_length=max_length,
            problems=2, max_new_tokens=4, seed=0, stop=NO_STOP,
        )  # fmt: skip
        for numbers in result.values():
            assert ("accuracy_in_context" in numbers) == (max_length == longest)


def test_in_context_arm_of_the_study(tmp_path, small_model, capsys):
    """The loss is that of the test rows behind the examples, without any step; of no example it is
    the model's own."""
    flags = [
        "--model", small_model, "--data", "changes", "--few-shot", "0", "3", "--seeds", "2",
        "--limit", "2", "--tasks", "change-63", "--adapt-steps", "2", "--max-length", "4",
        "--output-dir", tmp_path,
    ]  # fmt: skip
    assert run_here(evaluation, *flags, "--in-context") == 0
    rows = json.loads((tmp_path / "results.json").read_text())["few_shot"]
    name = str(small_model)
    by_arm = {(row["model"], row["shots"], row["seed"]): row["loss"] for row in rows}
    assert len(by_arm) == 6
    assert by_arm[name + " (in context)", 0, 0] == by_arm[name, 0, 0]
    _, tokenizer = load_config(name)
    model = load_weights(name)
    (task,) = (t for t in load_tasks("changes") if t.name == "change-63")
    test = evaluation.evenly(task.test, 2)
    for seed in range(2):
        args = evaluation.Args(few_shot=(0, 3))
        shots = evaluation.draw_shots(args, task, seed)
        prompts = encode_in_context(tokenizer, shots, test)
        loss = reference_loss(partial(logits_of, model), list(prompts.values())).item()
        assert by_arm[name + " (in context)", 3, seed] == pytest.approx(loss, rel=1e-5)
    assert f"| {name} (in context) | 3 |" in capsys.readouterr().out


def test_examples_that_do_not_fit_are_refused(tmp_path, small_model, capsys):
    flags = ["--model", small_model, "--data", "changes", "--few-shot", "30", "--in-context"]
    assert run_here(evaluation, *flags, "--output-dir", tmp_path / "o") == 2
    assert "positions: lower --few-shot" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits

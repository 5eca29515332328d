"""What the algorithms cost on a GPU: seconds, tokens/s, MFU, peak memory beside the dry run's.

    python bench_gpu.py                       # ten minutes on one 80 GB GPU; prints a table
    python bench_gpu.py fomaml decode --json gpu.json
    python bench_gpu.py --device cpu --sizes debug     # a dry pass, a minute

Random weights in the shapes of Qwen3 (0.6B, 1.7B, 4B) and random tokens, so nothing is downloaded;
the model is built by each script's own `build` (FSDP2, bf16 compute, fp32 master weights). A case
that fails says why, and the next one runs. MFU counts 6 FLOPs a parameter and token (adapters: 4,
the frozen base has no weight gradient), recomputation not, against --peak-tflops.
"""

import gc
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import tyro

import amft
import fomaml
import meta_lora
from bench import random_episodes
from games.play import Trajectory, Turn
from learner import PolicyLearner, adamw
from model import World, gathered, parameter_count, set_gradients, setup
from policy import sample

GROUPS = ("fomaml", "meta_lora", "decode", "amft")


@dataclass
class Args:
    """Time the scripts' steps on one GPU."""

    groups: tyro.conf.Positional[tuple[Literal[GROUPS], ...]] = GROUPS
    """What to time."""
    sizes: tuple[Literal["0.6B", "1.7B", "4B", "debug"], ...] = ("0.6B", "1.7B", "4B")
    """Shapes of Qwen3; debug is small enough for a CPU."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where."""
    length: int = 2048
    """Tokens a row."""
    repeats: int = 2
    """Timed steps, after one that is not; the median counts."""
    peak_tflops: float = 989.0
    """Of the GPU in bf16, without sparsity (H100, H200: 989)."""
    json: str | None = None
    """Write the rows here as well, one line each, as they come."""


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 151_936


SHAPES = {
    "0.6B": Shape(1024, 3072, 28, 16),
    "1.7B": Shape(2048, 6144, 28, 16),
    "4B": Shape(2560, 9728, 36, 32),
    "debug": Shape(64, 128, 2, 4, 600),
}


class Case(NamedTuple):
    """A step to be timed: `prepare` returns it, its tokens, and the estimate of its memory."""

    name: str
    size: str
    prepare: Callable  # (config, world, length) -> Work
    flops_per_parameter: int = 6


class Work(NamedTuple):
    step: Callable[[], None]
    tokens: int  # of a step
    needs: object = None  # the script's own Needs, where it has them


def config_of(size: str):
    from transformers import Qwen3Config

    shape = SHAPES[size]
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=8 if shape.heads > 8 else 2,
        head_dim=128 if shape.heads > 8 else 16,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )


def random_weights(config, device: torch.device, dtype=torch.bfloat16):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@contextmanager
def weights_of(script, config, device: torch.device) -> Iterator[None]:
    """Within the block `script` loads random weights instead of a folder's."""
    load = script.load_weights
    script.load_weights = lambda *args, **kwargs: random_weights(config, device)
    try:
        yield
    finally:
        script.load_weights = load


# --------------------------------------------------------------------------------------------------
# The steps


def fomaml_step(config, world: World, length: int, rows: int = 4, steps: int = 5, **flags) -> Work:
    """One meta-step on one task: K inner steps, the query gradient, AdamW."""
    args = fomaml.Args(
        inner_optimizer="sgd",
        inner_lr=1e-4,
        inner_steps=steps,
        support_batch=rows,
        query_batch=rows,
        tasks_per_step=1,
        max_length=length,
        **flags,
    )
    with weights_of(fomaml, config, world.device):
        model = fomaml.build(args, config, world)
    (episode,), tokens = random_episodes(1, steps, rows, length)
    learner = fomaml.MetaLearner(model, args, world, 0, tokens)
    optimizer = torch.optim.AdamW(learner.params, lr=1e-6, fused=True)

    def step() -> None:
        learner.keep()
        torch._foreach_zero_(learner.meta_gradient)
        learner.fomaml(episode)
        set_gradients(learner.params, learner.meta_gradient)
        torch.nn.utils.clip_grad_norm_(learner.params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    needs = fomaml.needs(args, config, world, tokens)
    return Work(step, (steps + 1) * rows * length, needs)


def lora_round(config, world: World, length: int, tasks: int = 4, rows: int = 1) -> Work:
    """One MeTA-LoRA round: T tasks in one forward, K = 10 inner steps and the query."""
    args = meta_lora.Args(
        inner_optimizer="adam",
        inner_lr=1e-4,
        inner_steps=10,
        support_batch=rows,
        query_batch=rows,
        tasks_per_step=tasks,
        max_length=length,
        activation_checkpointing=True,
    )
    with weights_of(meta_lora, config, world.device):
        model = meta_lora.build(args, config, world)
    adapters = meta_lora.add_adapters(args, model, world)
    episodes, tokens = random_episodes(tasks, args.inner_steps, rows, length)
    learner = meta_lora.AdapterLearner(model, adapters, args, world, 0, tokens)

    def step() -> None:
        torch._foreach_zero_(learner.meta_gradient)
        with adapters.with_dropout():
            learner.fomaml(episodes)

    needs = meta_lora.needs(args, config, world, tokens)
    return Work(step, tasks * 11 * rows * length, needs)


# Nothing ends a response, so that all have the same length
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)
ENDLESS = frozenset([-1])


def random_prompts(count: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(20, 500), k=length) for _ in range(count)]


def decode_ours(config, world: World, length: int, batch: int, new: int = 128) -> Work:
    model, prompts = random_weights(config, world.device).eval(), random_prompts(batch, 64)

    def step() -> None:
        sample(model, TOKENIZER, prompts, 1, new, stop=ENDLESS, batch_size=batch)

    return Work(step, batch * new)


def decode_generate(config, world: World, length: int, batch: int, new: int = 128) -> Work:
    """transformers' generate, as it comes."""
    model = random_weights(config, world.device).eval()
    ids = torch.tensor(random_prompts(batch, 64), device=world.device)

    def step() -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )

    return Work(step, batch * new)


def amft_step(config, world: World, length: int, sampling: bool, new: int = 512) -> Work:
    """16 prompts x 8 samples of 512 tokens: the rollout, or the training step on such rows."""
    args = amft.with_defaults(
        amft.Args(
            method="rl",
            samples=8,
            prompts_per_step=16,
            max_new_tokens=new,
            generation_batch=128,
            micro_batch=16,
            activation_checkpointing=True,
        )
    )
    with weights_of(amft, config, world.device):
        policy = amft.build(args, config, world)
    optimizer = adamw(args, policy)
    learner = PolicyLearner(args, policy, optimizer, world, 0)
    rng, prompts = random.Random(0), random_prompts(16, 128)
    groups = []
    for prompt in prompts:
        group = []
        for _ in range(8):
            ids = rng.choices(range(20, 500), k=new)
            logprobs, reward = [-6.0] * new, float(rng.random() < 0.5)
            group.append(Trajectory([Turn(prompt, ids, logprobs, True, "", reward)]))
        groups.append(group)

    def rollout() -> None:
        with gathered(policy):
            sample(policy.lm, TOKENIZER, prompts, 8, new, stop=ENDLESS, batch_size=128)

    def training() -> None:
        _, rows = amft.rows_of(args, groups, [group[0] for group in groups])
        amft.train_on(learner, 0.0, [], rows, schedule=1.0, with_D=False)

    needs = amft.needs(args, config, world, 128 + new)
    if sampling:
        return Work(rollout, 128 * new, needs)
    return Work(training, 128 * (128 + new), needs)


def cases(args: Args) -> Iterator[Case]:
    small = args.sizes[0]
    if "fomaml" in args.groups:
        for size in args.sizes:
            yield from fomaml_cases(size, small)
    if "meta_lora" in args.groups:
        name = "MeTA-LoRA round, T = 4, K = 10, 1 row a task, recomputed"
        for size in args.sizes:
            yield Case(name, size, lora_round, 4)
    if "decode" in args.groups:
        for batch in (1, 32, 256):
            name = f"decode, 64 + 128 tokens, batch {batch}"
            yield Case(f"{name}: ours", small, partial(decode_ours, batch=batch), 2)
            yield Case(f"{name}: generate", small, partial(decode_generate, batch=batch), 2)
    if "amft" in args.groups:
        size = "16 x 8 x (128 + 512)"
        yield Case(f"GRPO rollout, {size}", small, partial(amft_step, sampling=True), 2)
        yield Case(f"GRPO training step, {size}", small, partial(amft_step, sampling=False), 6)


def fomaml_cases(size: str, small: str) -> Iterator[Case]:
    name = "FOMAML meta-step, T = 1, K = 5, 4 rows"
    recomputed = {"activation_checkpointing": True}
    if size == small:
        yield Case(name, size, fomaml_step)
        yield Case(f"{name}, --compile", size, partial(fomaml_step, compile=True))
        for flag in ("offload_theta", "cpu_offload"):
            prepare = partial(fomaml_step, **{flag: True}, **recomputed)
            label = f"--{flag.replace('_', '-')}"
            yield Case(f"{name}, recomputed, {label}", size, prepare)
    if size == "4B":  # five buffers of 16 GB are too many
        prepare = partial(fomaml_step, offload_theta=True, **recomputed)
        yield Case(f"{name}, recomputed, --offload-theta", size, prepare)
    else:
        yield Case(f"{name}, recomputed", size, partial(fomaml_step, **recomputed))


# --------------------------------------------------------------------------------------------------


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, args: Args, world: World) -> dict:
    """Seconds of a step (median), tokens/s, MFU, peak memory and the dry run's estimate in GB."""
    cuda, config = world.device.type == "cuda", config_of(case.size)
    work = case.prepare(config, world, args.length)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + args.repeats):
        synchronize(world)
        start = time.perf_counter()
        work.step()
        synchronize(world)
        seconds.append(time.perf_counter() - start)
    n, median = parameter_count(config), sorted(seconds[1:])[(args.repeats - 1) // 2]
    flops = case.flops_per_parameter * n * work.tokens / median
    row = {
        "case": case.name,
        "size": case.size,
        "parameters": n,
        "first_seconds": seconds[0],
        "seconds": median,
        "tokens": work.tokens,
        "tokens_per_second": work.tokens / median,
        "mfu": flops / (args.peak_tflops * 1e12),
    }
    if cuda:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if work.needs:
        phase = work.needs.evaluation if "rollout" in case.name else work.needs.training
        row["estimate_gb"] = sum((work.needs.device | phase).values()) / 1e9
    return row


def table_row(row: dict) -> str:
    if "failed" in row:
        return f"| {row['case']} | {row['size']} | failed: {row['failed']} | | | | |"
    memory = [f"{row[name]:.1f}" if name in row else "-" for name in ("peak_gb", "estimate_gb")]
    return (
        f"| {row['case']} | {row['size']} | {row['seconds']:.3g} s "
        f"| {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {' | '.join(memory)} |"
    )


def main(args: Args) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu.py: --device cuda, but there is no GPU", file=sys.stderr)
        return 2
    if args.repeats < 1 or args.length < 8:
        print("bench_gpu.py: --repeats must be at least 1, --length 8", file=sys.stderr)
        return 2
    world = setup()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, rows of {args.length} tokens, "
        f"{time.strftime('%Y-%m-%d')}\n\n"
        "| work | size | time | tokens/s | MFU | peak GB | dry run's estimate |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    failed = 0
    for case in cases(args):
        try:
            row = measure(case, args, world)
        except (RuntimeError, ValueError, TypeError) as e:  # out of memory among them
            failed = 1
            row = {"case": case.name, "size": case.size, "failed": str(e).split("\n")[0][:200]}
        row["machine"] = machine
        print(table_row(row), flush=True)
        if args.json:
            with Path(args.json).open("a") as f:
                f.write(json.dumps(row) + "\n")
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))

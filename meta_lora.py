r"""MeTA-LoRA: meta-learn one LoRA adapter from which a few steps on a new task's few samples go far. The base stays frozen.

A round, with T tasks drawn and phi the shared adapter (A, B of every target layer: y = W x + (alpha / r) B A x):
    phi_i <- phi;  K times: phi_i <- phi_i - lr step(grad L_support(phi_i))          (stage 1: SGD or AdamW with a cold state per task)
    g_i = grad L_query(phi_i)                                                       (stage 2: taken at phi_i ...)
    phi <- AdamW(phi, clip(mean_i g_i))                                             (... applied at phi, to first order)
MeTA-LoRA, arXiv 2510.11598; Hu et al. 2021, LoRA, arXiv 2106.09685.

What is done differently, and why:
1. As the base is frozen, tasks are independent: the T adapters run in ONE forward. A is [T, r, d_in], B is [T, d_out, r], the rows of
   a batch are ordered by task, so K inner steps of all tasks cost K forwards instead of K x T. The loss is the sum over tasks of each
   task's own token mean (a mean over all tokens would scale each task's gradient), clipping is per task: the same numbers as task
   after task, to float tolerance.
2. Adapters live beside the model, added by forward hooks: the base's weights and code are untouched, nothing is copied per task.
3. Ranks take different tasks. FSDP2 shards the frozen base over all of them; adapters are replicated, and one all-reduce per round
   adds up their meta-gradients.
4. Evaluation adapts before it measures, as training does. Checkpoints are in PEFT's format; --merge also writes the whole model.

    python meta_lora.py                                                                       # laptop: embedded model, 3 minutes
    torchrun --standalone --nproc_per_node 1 meta_lora.py --model meta-llama/Llama-3.2-1B --data hub --steps 3000    # one GPU
    torchrun --standalone --nproc_per_node 4 meta_lora.py --model Qwen/Qwen3-4B-Instruct-2507 --data hub --steps 3000
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank $R --master_addr $HOST --master_port 29500 meta_lora.py --tasks-per-step 16 ...
"""

import functools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import eval as evaluation
import model as models
from data import DataError, Encoded, Episode, collate, episode_tasks, load_tasks, response_tokens, sample_episode
from model import Stop, World


@dataclass
class Args:
    """MeTA-LoRA (also Reptile on adapters, joint LoRA and LoRA from scratch) for any Hugging Face causal language model."""

    # What is trained, on what
    model: str = "tiny"
    """tiny (embedded), a local folder in Hugging Face format, or a hub name: the frozen base."""
    data: str = "embedded"
    """embedded, conventions (hidden rules), hub (EleutherAI/hendrycks_math), or a file or folder; see data.py."""
    task_column: str | None = None
    """What makes a task: a column of the data (embedded problems: family or subject)."""
    heldout_subjects: tuple[str, ...] = ()
    """Tasks or subjects kept out of meta-training; evaluation adapts to them. Without: the source's own, else the test rows."""
    support_ratio: float = 0.30
    """Share of a task's rows for stage 1."""
    query_ratio: float = 0.40
    """Share of a task's rows for stage 2; the rest is the test split."""
    max_length: int = 2048
    """Tokens; longer sequences are left out and counted, never cut."""
    output_dir: str = "runs/meta_lora"
    """Run folder: args.json, metrics.jsonl, evaluations.jsonl, curves.png, checkpoints. A folder in use gets a number appended."""
    seed: int = 42
    """The adapter's start, dropout and episodes are functions of it."""

    # The adapter
    r: int = 16
    """Rank of every adapter."""
    alpha: float = 32
    """Scale: alpha / r (alpha / sqrt(r) with --rank-stabilised)."""
    dropout: float = 0.05
    """On the adapter's input, while training."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their names."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r), rsLoRA, arXiv 2312.03732."""

    # The algorithm
    meta_gradient: Literal["fomaml", "reptile", "joint", "none"] = "fomaml"
    """fomaml (MeTA-LoRA); reptile (phi += epsilon mean(phi_i - phi), K+1 inner steps); joint (one AdamW step on all rows of the
    round: plain multi-task LoRA); none (no training: LoRA from scratch on each task, the evaluation alone)."""
    inner_steps: int = 10
    """K, steps of stage 1."""
    inner_lr: float = 3e-3
    """Stage 1's learning rate: 3e-3 suits the tiny model, 3e-4 SmolLM2-135M; the reference setting is 1e-4."""
    inner_optimizer: Literal["sgd", "adam"] = "adam"
    """Stage 1: AdamW without weight decay, cold for each task, or plain SGD."""
    inner_clip: float = 0.0
    """Limit of each task's gradient norm in stage 1, 0 for none."""
    support_batch: int = 4
    """Rows per task and inner step."""
    query_batch: int = 4
    """Rows per task of the query loss."""
    tasks_per_step: int = 4
    """T, tasks of a round, over all ranks."""
    tasks_per_forward: int = 0
    """Tasks run together, 0 for all of a rank: bounds memory."""
    steps: int = 60
    """Rounds."""
    outer_lr: float = 3e-3
    """Peak learning rate of AdamW on phi (reference setting: 5e-5)."""
    warmup_ratio: float = 0.1
    """Share of the rounds with rising learning rate; cosine to zero after it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW, both stages."""
    weight_decay: float = 0.01
    """AdamW of stage 2."""
    clip: float = 1.0
    """Limit of the meta-gradient's norm."""
    reptile_epsilon: float = 0.5
    """Reptile's step towards the adapted adapters (its schedule is the learning rate's)."""

    # Evaluation, logging, checkpoints
    eval_every: int = 30
    """Rounds between evaluations; also before the first and after the last. 0: only those two; -1: none."""
    eval_problems: int = 24
    """Test problems per task."""
    eval_tasks: int = 10
    """Tasks evaluated at most, 0 for all."""
    eval_max_new_tokens: int = 80
    """Length of greedy answers; 0 leaves accuracy out."""
    gain_every: int = 10
    """Rounds between measurements of the query loss before adaptation (one more forward)."""
    save_every: int = 30
    """Rounds between checkpoints; also at the end and on Ctrl-C or SIGTERM."""
    keep: int = 5
    """Checkpoints kept."""
    merge: bool = False
    """At the end also write the base with phi merged into its weights (Hugging Face format) to merged/ of the run folder."""
    resume: bool = False
    """Continue the newest checkpoint of --output-dir."""
    dry_run: bool = False
    """Check versions, devices, model, data, memory and disk without reading weights; exit status 1 if the run could not finish."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb; WANDB_MODE=offline works)."""

    # Machine
    activation_checkpointing: bool = False
    """Recompute activations in backward."""
    trust_remote_code: bool = False
    """Let a hub model run its own code."""

    @property
    def replicas(self) -> int:
        """Every rank holds the whole adapter and its own tasks; the base is sharded over all ranks."""
        return 1


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout; on a CPU from 16 random bits an element (p to within 1/65536), as the library's draws take a fifth of a round there."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, p > 0)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.long).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class Adapters:
    """The LoRA adapters of T tasks on a frozen model, run together.

    phi: the shared adapter, a list of leaves A [r, d_in], B [d_out, r] by layer. `stack` holds the same for T tasks: [T, r, d_in],
    [T, d_out, r]. A forward adds scale * B_t (A_t x) to the output of each target layer for the rows of task t; a batch holds the
    same number of rows for every task, ordered by task.
    """

    def __init__(self, model, args: Args, device: torch.device):
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.split(".")[-1] in args.target_modules}
        self.scale = args.alpha / (math.sqrt(args.r) if args.rank_stabilised else args.r)
        self.dropout, self.training = args.dropout, False
        generator = torch.Generator().manual_seed(args.seed)
        self.phi: list[torch.Tensor] = []
        for layer in self.layers.values():
            bound = 1 / math.sqrt(layer.in_features)  # as torch.nn.Linear, and PEFT, start A; B = 0: the adapter starts as no change
            self.phi.append((torch.rand(args.r, layer.in_features, generator=generator) * 2 - 1).mul_(bound).to(device))
            self.phi.append(torch.zeros(layer.out_features, args.r, device=device))
        self.stack: list[torch.Tensor] = []
        for i, layer in enumerate(self.layers.values()):
            layer.register_forward_hook(functools.partial(self._add, i))

    def start(self, tasks: int) -> None:
        """phi_i <- phi for `tasks` tasks."""
        self.stack = [p.expand(tasks, *p.shape).clone().requires_grad_() for p in self.phi]

    def _add(self, i: int, layer, inputs, output):
        x, (A, B) = inputs[0], self.stack[2 * i : 2 * i + 2]
        x = dropout(x, self.dropout if self.training else 0.0).to(A.dtype)
        x = x.reshape(len(A), -1, x.shape[-1])  # [T, rows x L, d_in]
        low = torch.bmm(x, A.transpose(1, 2))  # [T, rows x L, r]
        y = output.reshape(len(A), -1, output.shape[-1]).to(A.dtype)
        return torch.baddbmm(y, low, B.transpose(1, 2), alpha=self.scale).view(output.shape).to(output.dtype)


class Learner:
    """Model, adapters and batches together: what the loops below need at every round."""

    def __init__(self, model, adapters: Adapters, args: Args, world: World, pad_id: int, tokens: dict[str, Encoded]):
        self.model, self.adapters, self.args, self.world, self.pad_id, self.tokens = model, adapters, args, world, pad_id, tokens
        self.seen = 0  # tokens through forward and backward on this rank

    def losses(self, batches: list, total_tokens: int = 0) -> torch.Tensor:
        """[T]: each task's mean token loss on its examples (batches: one list of equal length per task), in one forward.

        total_tokens: divide every task's sum by it instead (joint training: a mean over the whole union).
        """
        rows = [[self.tokens[e.id] for e in examples] for examples in batches]
        self.seen += sum(len(r.ids) for task in rows for r in task)
        batch = {k: v.to(self.world.device) for k, v in collate([r for task in rows for r in task], self.pad_id).items()}
        losses = models.token_losses(self.model, batch)  # summed over each row's tokens
        counts = torch.tensor([total_tokens or response_tokens(task) for task in rows], device=losses.device)
        return losses.view(len(rows), -1).sum(1) / counts

    def inner_loop(self, steps: list) -> torch.Tensor:
        """Stage 1: phi_i after one step on each of `steps` (a list of examples per task), all tasks at once. Returns [K, T], the losses."""
        stack, args = self.adapters.stack, self.args
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in stack] if args.inner_optimizer == "adam" else None
        history = []
        for t, batches in enumerate(steps, 1):
            losses = self.losses(batches)
            losses.sum().backward()  # a task's gradient is that of its own mean
            history.append(losses.detach())
            with torch.no_grad():
                grads = [p.grad for p in stack]
                if args.inner_clip:
                    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)  # [T]
                    factors = (args.inner_clip / (norms + 1e-6)).clamp(max=1)[:, None, None]
                    grads = [g * factors for g in grads]
                for i, (p, g) in enumerate(zip(stack, grads, strict=True)):
                    if moments is None:
                        p.add_(g, alpha=-args.inner_lr)
                    else:  # bias-corrected, as torch.optim.Adam's first steps
                        m, v = moments[i]
                        m.lerp_(g, 1 - args.betas[0])
                        v.lerp_(g.square(), 1 - args.betas[1])
                        p.addcdiv_(m, (v / (1 - args.betas[1] ** t)).sqrt_().add_(1e-8), value=-args.inner_lr / (1 - args.betas[0] ** t))
                    p.grad = None
        return torch.stack(history)


def meta_gradient(learner: Learner, episodes: list[Episode], method: str, support_batch: int, total_tasks: int, union_tokens: int = 0,
                  measure_gain: bool = False, stop: Stop | None = None) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """(meta-gradient summed over ranks, [len(episodes), 3]: support loss of the last inner step, query loss after adaptation and
    before it (0 when not measured)); None if a stop was agreed on. reptile: mean of phi_i - phi in place of the gradient.

    union_tokens: response tokens of the whole round (for joint). phi itself is never touched.
    """
    adapters = learner.adapters
    total = [torch.zeros_like(p) for p in adapters.phi]
    losses = torch.zeros(len(episodes), 3, device=learner.world.device)
    chunk = learner.args.tasks_per_forward or len(episodes)
    for at in range(0, len(episodes), chunk):
        if stop is not None and stop.agreed():
            return None
        part, out = episodes[at : at + chunk], losses[at : at + chunk]
        steps = [[e.support[k : k + support_batch] for e in part] for k in range(0, len(part[0].support), support_batch)]
        queries = [e.query for e in part]
        adapters.start(len(part))
        adapters.training = True
        if measure_gain and method != "joint":
            adapters.training = False
            with torch.no_grad():
                out[:, 2] = learner.losses(queries)
            adapters.training = True
        if method == "joint":  # one adapter for all tasks, mean over all tokens of the round
            for batches in (*steps, queries):
                shares = learner.losses(batches, union_tokens)  # [T]
                shares.sum().backward()
                counts = torch.tensor([response_tokens([learner.tokens[e.id] for e in b]) for b in batches], device=shares.device)
                out[:, 0], out[:, 1] = out[:, 1].clone(), shares.detach() * union_tokens / counts
        elif method == "reptile":  # K + 1 steps for equal tokens, the last on the query rows
            history = learner.inner_loop([*steps, queries])
            out[:, 0], out[:, 1] = history[-2], history[-1]
        else:
            out[:, 0] = learner.inner_loop(steps)[-1]  # stage 1: phi_i
            query = learner.losses(queries)
            query.sum().backward()  # stage 2: g_i = grad L_query(phi_i)
            out[:, 1] = query.detach()
        with torch.no_grad():
            for g, p, phi in zip(total, adapters.stack, adapters.phi, strict=True):
                if method == "reptile":
                    g.add_((p - phi).sum(0), alpha=1 / total_tasks)
                else:
                    g.add_(p.grad.sum(0), alpha=1.0 if method == "joint" else 1 / total_tasks)
    adapters.training = False
    if learner.world.size > 1:
        for g in total:
            dist.all_reduce(g)
    return total, losses


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def write_adapter(folder: Path, adapters: Adapters, args: Args) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft.PeftModel.from_pretrained reads them."""
    from safetensors.torch import save_file

    names = [f"base_model.model.{layer}.lora_{x}.weight" for layer in adapters.layers for x in "AB"]
    save_file({n: p.detach().cpu().contiguous() for n, p in zip(names, adapters.phi, strict=True)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": models.resolve(args.model), "r": args.r, "lora_alpha": args.alpha,
              "lora_dropout": args.dropout, "target_modules": list(args.target_modules), "use_rslora": args.rank_stabilised, "bias": "none", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def write_merged(folder: Path, model, adapters: Adapters, tokenizer, dtype: torch.dtype) -> None:
    """The base with W + scale B A in place of every target W. Collective; rank 0 writes."""
    weights = models.full_weights(model, torch.float32)
    if dist.get_rank() == 0:
        for i, layer in enumerate(adapters.layers):
            A, B = (p.detach().float().cpu() for p in adapters.phi[2 * i : 2 * i + 2])
            weights[f"{layer}.weight"] += adapters.scale * (B @ A)
        models.save_pretrained(folder, model, tokenizer, {n: w.to(dtype) if w.is_floating_point() else w for n, w in weights.items()}, dtype)
    dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything expensive


def check(args: Args, size: int) -> None:
    """Raises DataError for arguments that cannot work."""
    models.check_positive(args, ("r", "inner_steps", "support_batch", "query_batch", "tasks_per_step", "steps", "keep", "save_every", "max_length"),
                          ("alpha", "inner_lr", "outer_lr", "clip"))
    if not 0 <= args.dropout < 1:
        raise DataError(f"--dropout must be in [0, 1), not {args.dropout}")
    if args.tasks_per_step % size:
        raise DataError(f"--tasks-per-step {args.tasks_per_step} cannot be shared equally by the {size} ranks")


def prepare(args: Args, say) -> tuple:
    """Config, tokenizer, tasks and their token ids: all that can be known without weights. Raises DataError or ModelError."""
    config, tokenizer = models.load_config(args.model, args.trust_remote_code)
    linear = {n.split(".")[-1] for n, m in models.skeleton(config, trust_remote_code=args.trust_remote_code).named_modules() if isinstance(m, torch.nn.Linear)}
    if unknown := [t for t in args.target_modules if t not in linear]:
        raise DataError(f"--target-modules {' '.join(unknown)}: the model has no such linear layer; it has {', '.join(sorted(linear))}")
    tasks, evaluated, tokens, report = episode_tasks(
        tokenizer, load_tasks(args.data, task_column=args.task_column, heldout=args.heldout_subjects, support_ratio=args.support_ratio,
                              query_ratio=args.query_ratio, seed=args.seed),
        args.max_length, args.inner_steps, args.support_batch, args.query_batch, args.eval_tasks)
    say(report)
    return config, tokenizer, tasks, evaluated, tokens


def dry_run(args: Args, world: World) -> int:
    """The environment test. Returns the exit status: 1 if the run could not finish."""
    say = functools.partial(print, flush=True) if world.rank == 0 else lambda *a: None
    reasons = models.check_ranks(world, say)
    try:
        config, tokenizer, tasks, evaluated, tokens = prepare(args, say)
        for t in tasks + [t for t in evaluated if t.heldout]:
            say(f"  {t.name}{' (held out)' if t.heldout else ''}: {len(t.support)} support, {len(t.query)} query, {len(t.test)} test")
        lengths = [len(r.ids) for r in tokens.values()]
        rows = args.tasks_per_step * (args.inner_steps * args.support_batch + args.query_batch)
        say(f"about {rows * sum(lengths) / len(lengths):,.0f} tokens per round; mean sequence {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}")
        together = args.tasks_per_forward or args.tasks_per_step // world.size
        batch = together * max(args.support_batch, args.query_batch) * max(lengths)
        reasons += models.check_space(config, world, say, 0.5 if world.device.type == "cuda" else 1, batch, args.activation_checkpointing, args.output_dir, int(args.merge))
    except (DataError, models.ModelError) as e:
        reasons.append(str(e))
    say("\n".join(f"cannot finish: {r}" for r in reasons) or "ready")
    return 1 if reasons else 0


# ---------------------------------------------------------------------------------------------------------------------


def build(args: Args, config, world: World):
    """The frozen base, sharded over all ranks: bf16 on GPUs."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    source = models.load_weights(args.model, dtype, args.trust_remote_code) if world.rank == 0 else None
    model = models.skeleton(config, dtype, trust_remote_code=args.trust_remote_code).requires_grad_(False)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if world.size > 1:
        for block in models.layers_to_shard(model):
            fully_shard(block, mesh=world.mesh["shard"])
        fully_shard(model, mesh=world.mesh["shard"])
    models.materialize(model, source, world.device)
    return model.train()


# What may differ when a run is resumed: it does not change the mathematics.
FREE = {"resume", "output_dir", "wandb", "save_every", "keep", "eval_every", "tasks_per_forward", "activation_checkpointing", "dry_run", "merge"}


def main(args: Args, world: World) -> int:
    if args.dry_run:
        return dry_run(args, world)
    rank0 = world.rank == 0
    say = functools.partial(tqdm.write, file=sys.stdout) if rank0 else lambda *a: None
    config, tokenizer, tasks, evaluated, tokens = prepare(args, say)
    run = models.run_folder(args.output_dir, asdict(args), args.resume, FREE, world.rank)
    resume_from = models.checkpoints(run)[-1] if args.resume and models.checkpoints(run) else None
    start_time = time.time()

    model = build(args, config, world)
    adapters = Adapters(model, args, world.device)
    optimizer = torch.optim.AdamW(adapters.phi, lr=args.outer_lr, betas=args.betas, weight_decay=args.weight_decay)
    learner = Learner(model, adapters, args, world, tokenizer.pad_token_id, tokens)
    stop = Stop(world)
    state = {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
    if resume_from:
        saved = torch.load(resume_from / "state" / "adapter.pt", map_location=world.device, weights_only=True)
        for p, q in zip(adapters.phi, saved["phi"], strict=True):
            p.copy_(q)
        optimizer.load_state_dict(saved["optimizer"])
        state = json.loads((resume_from / "state" / "extra.json").read_text())
    n, base = sum(p.numel() for p in adapters.phi), sum(p.numel() for p in model.parameters())
    say(f"{args.meta_gradient}: {n / 1e6:.2f}M adapter parameters on {len(adapters.layers)} layers of a base of {base / 1e6:.1f}M, {world.size} rank(s), "
        f"run folder {run}" + (f", resumed at step {state['step']}" if resume_from else ""))
    log = evaluation.Log("meta_lora", asdict(args), run, rank0, state["step"])
    saved_at = state["step"] if resume_from else -1

    def write(tmp: Path) -> None:
        if rank0:
            write_adapter(tmp, adapters, args)
            torch.save({"phi": adapters.phi, "optimizer": optimizer.state_dict()}, tmp / "state" / "adapter.pt")

    def save():
        nonlocal saved_at
        if saved_at != state["step"]:
            models.save_checkpoint(run / "checkpoint", write, state, args.keep)
            saved_at = state["step"]

    def adapt(rows) -> None:
        adapters.start(1)
        adapters.training = True
        learner.inner_loop([[rows[k : k + args.support_batch]] for k in range(0, len(rows), args.support_batch)])
        adapters.training = False

    per_rank = args.tasks_per_step // world.size
    steps = 0 if args.meta_gradient == "none" else args.steps
    bar = tqdm(total=steps, initial=state["step"], disable=not rank0, desc=args.meta_gradient, mininterval=0.5)
    failed, stopped = None, False
    for step in range(state["step"], steps + 1):
        last = step == steps
        due = args.eval_every >= 0 and (step == 0 or last or (args.eval_every and step % args.eval_every == 0))
        if due and step not in log.evaluations:
            torch.manual_seed(args.seed)  # dropout: the same on every rank, as all adapt to the same task
            adapters.start(1)
            result = evaluation.adaptation(model, evaluated, tokens, tokenizer, world, adapt=adapt, restore=lambda: adapters.start(1),
                                           shots=args.inner_steps * args.support_batch, problems=args.eval_problems,
                                           max_new_tokens=args.eval_max_new_tokens, seed=args.seed, stop=stop)
            if stopped := result is None:
                break
            log.evaluation(step, result)
        if last:
            break
        began, seen = time.perf_counter(), learner.seen
        torch.manual_seed(hash((args.seed, step, world.rank)) % 2**31)  # dropout
        meta_batch = [sample_episode(tasks, args.seed, step, i, r, per_rank, args.inner_steps * args.support_batch, args.query_batch)
                      for r in range(world.size) for i in range(per_rank)]
        mine = range(world.rank * per_rank, (world.rank + 1) * per_rank)
        union = response_tokens([tokens[e.id] for ep in meta_batch for e in ep.support + ep.query])
        gain = args.gain_every > 0 and (step == 0 or (step + 1) % args.gain_every == 0)
        result = meta_gradient(learner, [meta_batch[i] for i in mine], args.meta_gradient, args.support_batch, args.tasks_per_step, union, gain, stop)
        if stopped := result is None:
            break
        losses = torch.zeros(args.tasks_per_step, 3, device=world.device)
        losses[mine.start : mine.stop] = result[1]
        dist.all_reduce(losses)

        scale = models.learning_rate(step, args.steps, args.warmup_ratio)
        for p, g in zip(adapters.phi, result[0], strict=True):
            p.grad = g
        norm = torch.nn.utils.get_total_norm(result[0])
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(losses).all())  # summed over all ranks: they agree
        if finite and args.meta_gradient == "reptile":
            for p, direction in zip(adapters.phi, result[0], strict=True):
                p.add_(direction, alpha=args.reptile_epsilon * scale)
        elif finite:
            torch.nn.utils.clip_grad_norm_(adapters.phi, args.clip)
            optimizer.param_groups[0]["lr"] = args.outer_lr * scale
            optimizer.step()
        optimizer.zero_grad()
        state["step"], state["skipped"] = step + 1, state["skipped"] + (not finite)
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1

        seconds = time.perf_counter() - began
        metrics = evaluation.step_metrics(losses.tolist(), [ep.task for ep in meta_batch], gain and args.meta_gradient != "joint")
        speed = (learner.seen - seen) * world.size / seconds
        metrics |= {"step": step + 1, "meta/grad_norm": norm.item(), "lr": args.outer_lr * scale, "skipped_steps": state["skipped"], "seconds": seconds,
                    "tokens_per_second": speed, "peak_memory_gb": models.peak_memory(world.device) / 1e9}
        if peak := models.peak_flops(world.device):
            metrics["mfu"] = 4 * base * speed / world.size / peak  # no gradient of the frozen weights
        log.step(metrics)
        bar.update()
        bar.set_postfix(query=f"{metrics['meta/loss']:.3f}", gain=f"{log.last_gain:+.3f}" if log.last_gain is not None else "-", tok_s=f"{speed:,.0f}")
        if state["skipped_in_a_row"] >= 5:
            failed = (f"the loss or meta-gradient was not finite in 5 rounds running (to round {step + 1}): lower --inner-lr or --outer-lr. "
                      f"Last good checkpoint: {models.checkpoints(run)[-1] if models.checkpoints(run) else 'none'}")
            break
        if (step + 1) % args.save_every == 0 and state["skipped_in_a_row"] == 0:
            save()
    bar.close()
    if failed:
        print(f"meta_lora.py: {failed}", file=sys.stderr) if rank0 else None
        return 1
    save()
    if stopped:
        say(f"stopped at step {state['step']} and saved; to go on: the same command with --output-dir {run} --resume")
        return 0
    if args.merge:
        write_merged(run / "merged", model, adapters, tokenizer, next(model.parameters()).dtype)
    if rank0:
        log.finish(start_time)
    return 0


def cli() -> int:
    return models.run_script("meta_lora.py", Args, check, main)


if __name__ == "__main__":
    sys.exit(cli())

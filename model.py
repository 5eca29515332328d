"""Models: ranks, load, shard, generate, save, run folders; and the making of the embedded tiny model.

    python model.py                        # trains assets/tiny from the embedded problems (about 15 minutes on 2 CPU cores)
    python model.py --output-dir my_tiny --steps 200
    python model.py --bare                 # then assets/tiny_bare, where amft.py starts (a minute)

Every function works for any Hugging Face causal LM; nothing is written for one family.
"""

import functools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import DataError, prompt_text, template

TINY = Path(__file__).resolve().parent / "assets" / "tiny"
EMBEDDED = ("tiny", "tiny_bare", "tiny_games", "tiny_vision")  # folders of assets/


class ModelError(ValueError):
    """The model cannot be used as asked; the message is one line for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class World:
    """A 2-D mesh replica x shard. Ranks of one shard group hold one copy of the weights and work on the same task together."""

    device: torch.device
    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1
    mesh: object = field(default=None, repr=False)

    @property
    def shards(self) -> int:
        return self.size // self.replicas

    @property
    def shard(self) -> int:
        return self.rank % self.shards


def setup(replicas: int = 1) -> World:
    """Process group (without torchrun too, as the only rank) and mesh."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    kwargs = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, device_id=device if cuda else None, **kwargs)
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replica", "shard"))
    return World(device, rank, size, rank // (size // replicas), replicas, mesh)


def total(world: World, *values: float) -> list[float]:
    """Sums over all ranks."""
    x = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(x)
    return x.tolist()


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter or gradient."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


class Stop:
    """Ctrl-C and SIGTERM become a request that all ranks agree on; a second one ends the process at once."""

    def __init__(self, world: World):
        self.world, self.requested = world, False
        signal.signal(signal.SIGINT, self._request)
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, signum, frame):
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)

    def agreed(self) -> bool:
        flag = torch.tensor(float(self.requested), device=self.world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def resolve(name: str) -> str:
    """`tiny`, `tiny_bare`, a local folder in Hugging Face format, or a hub name -> what from_pretrained takes. Reads no weights."""
    if name in EMBEDDED:
        return str(TINY.with_name(name))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ModelError(f"{name} is a folder without config.json: not a model in Hugging Face format")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such model folder: {name}")
    return name


def load_config(name: str, trust_remote_code: bool = False):
    """(config, tokenizer) without the weights. Raises ModelError if the model is unknown or unreachable."""
    from transformers import AutoConfig, AutoTokenizer

    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # many kinds: hub, network, JSON, unknown architecture
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"cannot load model {name}: {reason[:200]} (use tiny, a local folder, or a hub name)") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer


def load_processor(name: str, trust_remote_code: bool = False):
    """The processor of a vision model: its tokenizer and its image processor. Raises ModelError for a model without one."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
    except Exception as e:
        raise ModelError(f"cannot load the processor of {name}: {(str(e).strip().splitlines() or [''])[0][:200]}") from None
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"{name} takes no pictures: use tiny_vision or a model of AutoModelForImageTextToText")
    processor.tokenizer.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load_readers(name: str, vision: bool, trust_remote_code: bool = False) -> tuple:
    """(config, tokenizer, processor), the processor None without vision. Reads no weights."""
    config, tokenizer = load_config(name, trust_remote_code)
    processor = load_processor(name, trust_remote_code) if vision else None
    return config, processor.tokenizer if processor else tokenizer, processor


def auto_class(config):
    """AutoModelForImageTextToText for a model with a vision part, else AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def load_weights(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False):
    """The model with its weights, on the CPU, in `dtype`."""
    from transformers import AutoConfig, logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
        return auto_class(config).from_pretrained(resolve(name), dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot load model {name}: {str(e).strip().splitlines()[0][:200]}") from None


def skeleton(config, dtype: torch.dtype = torch.float32, attention: str | None = None, trust_remote_code: bool = False):
    """The model on the meta device: shapes and names without memory."""
    extra = {"attn_implementation": attention} if attention else {}
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **extra)


def layers_to_shard(model) -> list[torch.nn.Module]:
    """The transformer blocks, by the library's own convention: modules whose class is named in `_no_split_modules`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


def materialize(model, source, device: torch.device) -> None:
    """Give a (sharded) skeleton its memory on `device` and the weights of `source`, which only rank 0 of the job needs to hold.

    One parameter at a time is broadcast and cut, so that no other rank ever holds the whole model. Buffers that are not in the
    state dict (rotary frequencies) are copied as well.
    """
    model.to_empty(device=device)
    model.tie_weights()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    values = dict(source.named_parameters()) | dict(source.named_buffers()) if rank == 0 else {}
    where = torch.device("cpu") if device.type == "cpu" else torch.device("cuda", torch.cuda.current_device())
    with torch.no_grad():
        for name, target in [*model.named_parameters(), *model.named_buffers()]:
            value = values[name].detach().to(where, target.dtype) if rank == 0 else torch.empty(target.shape, dtype=target.dtype, device=where)
            if world > 1:
                dist.broadcast(value, 0)
            if isinstance(target, DTensor):
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
                target.to_local().copy_(value)
            else:
                target.copy_(value)


def parameter_count(config, trust_remote_code: bool = False) -> int:
    return sum(p.numel() for p in skeleton(config, trust_remote_code=trust_remote_code).parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Loss and generation


def token_losses(model, batch: dict) -> torch.Tensor:
    """[B]: cross-entropy (nats) summed over each row's response tokens.

    batch: input_ids and labels, each [B, T] (and pixel_values), padded on the right, so that causal attention never sees the padding and no mask is
    needed. Logits are computed from the first response token of the batch on (a multiple of 32, so that shapes repeat), and only
    those of response tokens become fp32.
    """
    labels = batch["labels"][:, 1:]  # [B, T-1]
    wanted = labels != -100
    length = batch["input_ids"].shape[1]
    keep = min(length, -(-(length - int(wanted.any(0).nonzero()[0])) // 32) * 32)
    pictures = {k: v for k, v in batch.items() if k not in ("input_ids", "labels")}
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=keep, **pictures).logits
    wanted, labels = wanted[:, length - keep :], labels[:, length - keep :]
    logits = logits[:, :-1][wanted]
    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[wanted], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, wanted.nonzero()[:, 0], losses)


def token_loss(model, batch: dict) -> torch.Tensor:
    """token_losses summed over the batch."""
    return token_losses(model, batch).sum()


def learning_rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak at a step: linear warm-up, cosine to zero."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def gathered(model):
    """Within the block every rank holds the whole weights, so that ranks can run forwards (generation, evaluation) alone."""
    wrapped = [m for m in model.modules() if isinstance(m, FSDPModule)]
    training = model.training
    model.eval()
    for m in wrapped:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in wrapped:
            m.reshard()
            m.set_reshard_after_forward(m is not model, recurse=False)
        model.train(training)


class Sample(NamedTuple):
    ids: list[int]  # of the response, with the token that ended it if `finished`
    logprobs: list[float]  # log pi(token), untempered, one for each id
    finished: bool  # False: cut at max_new_tokens

    @property
    def answer(self) -> list[int]:
        """The ids without the end token."""
        return self.ids[:-1] if self.finished else self.ids


def _uniform(seeds: torch.Tensor, t: int) -> torch.Tensor:
    """[B] numbers in [0, 1), number t of the stream of each seed (splitmix64): a sequence's draws do not depend on its batch."""
    z = seeds + torch.full_like(seeds, t + 1) * -0x61C8864680B583EB  # int64 arithmetic wraps
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).double() / 2**53


def _invert(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of weights [B, N] the place where its running sum passes target [B], and the sum before that place."""
    sums = weights.cumsum(-1)
    place = torch.searchsorted(sums, target[:, None], right=True).clamp(max=weights.shape[1] - 1)
    return place.squeeze(1), (sums.gather(1, place) - weights.gather(1, place)).squeeze(1)


def _draw(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """([B] tokens, [B] their untempered log-probabilities) from [B, V] logits, by inverting the distribution function at u [B];
    temperature 0 takes the largest. The running sum goes over blocks of 256 tokens and then within one: a sum over all is slow."""
    plain = logits.softmax(-1)
    scale = logits.amax(-1) - plain.amax(-1).log()  # log sum exp, from the largest probability, which is never small
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        probs, order = plain if temperature == 1 else (logits / temperature).softmax(-1), None
        if top_p < 1:  # the smallest set of most likely tokens with at least that mass
            probs, order = probs.sort(-1, descending=True)
            probs = probs * (probs.cumsum(-1) - probs < top_p)
        blocks = F.pad(probs, (0, -probs.shape[1] % 256)).unflatten(1, (-1, 256))
        sums = blocks.sum(-1)
        target = u.to(probs.dtype) * sums.sum(-1)
        block, before = _invert(sums, target)
        place, _ = _invert(blocks[torch.arange(len(blocks), device=blocks.device), block], target - before)
        token = (256 * block + place).clamp(max=logits.shape[1] - 1)
        token = token if order is None else order.gather(1, token[:, None]).squeeze(1)
    return token, logits.gather(1, token[:, None]).squeeze(1) - scale


@functools.cache
def _rolling_layer():
    """The class RollingLayer; made when first needed, as importing transformers takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class RollingLayer(DynamicLayer):
        """A cache layer with room: a new token is written in place, a finished row is overwritten by one from the end of the batch. The
        library's DynamicLayer copies the whole cache for every token and for every drop, a third of the time on a small model."""

        def __init__(self, layer: DynamicLayer, room: int):
            super().__init__()
            self.is_initialized, self.dtype, self.device = True, layer.dtype, layer.device
            self.rows, self.length, self.room = layer.keys.shape[0], layer.keys.shape[2], room
            self.keys, self.values = layer.keys, layer.values
            self._grow()

        def _grow(self) -> None:
            self.buffers = []
            for old in (self.keys, self.values):
                new = old.new_empty(self.rows, old.shape[1], self.length + self.room, old.shape[3])
                new[:, :, : self.length] = old
                self.buffers.append(new)
            self._show()

        def _show(self) -> None:
            self.keys, self.values = (b[: self.rows, :, : self.length] for b in self.buffers)

        def update(self, key_states, value_states, *args, **kwargs):
            end = self.length + key_states.shape[-2]
            if end > self.buffers[0].shape[2]:
                self._grow()
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[: self.rows, :, self.length : end] = new
            self.length = end
            self._show()
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            """indices: in place but where a row of the end fills a gap."""
            to = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
            for buffer in self.buffers:
                buffer[to, :, : self.length] = buffer[indices[to], :, : self.length]
            self.rows = len(indices)
            self._show()

    return RollingLayer


def _with_room(cache, room: int) -> None:
    """Plain full-attention layers become RollingLayers; sliding windows and others stay the library's."""
    from transformers.cache_utils import DynamicLayer

    cache.layers[:] = [_rolling_layer()(layer, room) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers]


@torch.no_grad()
def sample(model, tokenizer, prompts: Sequence[Sequence[int]], samples_per_prompt: int = 1, max_new_tokens: int = 256, temperature: float = 1.0,
           top_p: float = 1.0, generator: torch.Generator | None = None, stop: frozenset[int] | None = None, batch_size: int = 128,
           progress: str | None = None, seeds: Sequence[int] | None = None) -> list[Sample]:
    """samples_per_prompt responses to each prompt (token ids), prompt by prompt.

    A prompt is prefilled once and its cache repeated; finished rows leave the batch and its cache. Every sequence has its own random
    stream, seeded by the generator (or by `seeds`, one for each response), so batching changes results only where rounding decides a near-tie. stop: tokens that end a
    response (default: the end-of-sequence token). progress: the title of a bar. Under FSDP2 call it within gathered(model).
    """
    device = next(model.parameters()).device
    stop_ids = torch.tensor(sorted(stop or {tokenizer.eos_token_id}), device=device)
    n = samples_per_prompt
    seeds = torch.tensor(seeds, device=device) if seeds is not None else torch.randint(-(2**62), 2**62, (len(prompts) * n,), generator=generator).to(device)
    tokens = torch.zeros(len(prompts) * n, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts) * n, max_new_tokens, device=device)
    lengths = torch.full((len(prompts) * n,), max_new_tokens, device=device)
    finished = torch.zeros(len(prompts) * n, dtype=torch.bool, device=device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, batch_size // n)
    bar = tqdm(total=len(prompts) * n, desc=progress, disable=progress is None, unit="response")
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        length = -(-max(len(prompts[i]) for i in chosen) // 32) * 32
        ids = torch.full((len(chosen), length), tokenizer.pad_token_id)  # left-padded
        mask = torch.zeros_like(ids)
        for j, i in enumerate(chosen):
            ids[j, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[j, length - len(prompts[i]) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rows = (torch.tensor(chosen, device=device)[:, None] * n + torch.arange(n, device=device)).flatten()  # where the results go
        cache = None
        for t in range(max_new_tokens):
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits, positions = out.past_key_values, out.logits[:, -1].float(), positions[:, -1:]
            if t == 0:
                if n > 1:
                    cache.batch_repeat_interleave(n)
                    logits, positions, mask = (x.repeat_interleave(n, 0) for x in (logits, positions, mask))
                _with_room(cache, min(max_new_tokens, 256))
            token, logprob = _draw(logits, _uniform(seeds[rows], t), temperature, top_p)
            tokens[rows, t], logprobs[rows, t] = token, logprob
            ended = torch.isin(token, stop_ids)
            if ended.any():
                finished[rows[ended]], lengths[rows[ended]] = True, t + 1
                left = (~ended).nonzero().squeeze(1)
                bar.update(len(rows) - len(left))
                kept = torch.arange(len(left), device=device)  # rows of the end fill the gaps
                kept[ended[: len(left)]] = left[left >= len(left)]
                rows = rows[kept]
                if len(rows) == 0:
                    break
                cache.batch_select_indices(kept)
                token, mask, positions = token[kept], mask[kept], positions[kept]
            ids, positions = token[:, None], positions + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        bar.update(len(rows))
    bar.close()
    return [Sample(ids[:k], p[:k], f) for ids, p, k, f in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The policy: a language model, with log-probabilities that never hold [B, T, V] in fp32


class TokenLogprobs(torch.autograd.Function):
    """logits [n, V], targets [n] -> log pi(target) [n] and the entropy [n], with one buffer of n x V numbers kept: log_softmax and what
    follows it would make five, and half of a step of a small model with a large vocabulary goes there."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.set_materialize_grads(False)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = logits.softmax(-1)
        scale = logits.amax(-1) - p.amax(-1).log()  # log sum exp
        entropy = scale - torch.bmm(p[:, None], logits[:, :, None]).flatten()
        ctx.save_for_backward(p, targets, entropy)
        return logits.gather(1, targets[:, None]).squeeze(1) - scale, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        p, targets, entropy = ctx.saved_tensors
        factor = 0.0 if grad_logprobs is None else -grad_logprobs[:, None]
        if grad_entropy is not None:  # dH / dlogit = -p (log p + H)
            factor = factor - grad_entropy[:, None] * (p.clamp(min=torch.finfo(p.dtype).tiny).log() + entropy[:, None])
        grad = p.mul_(factor)  # in place: autograd refuses a second backward through it
        if grad_logprobs is not None:
            grad[torch.arange(len(targets), device=targets.device), targets] += grad_logprobs
        return grad, None


class Policy(torch.nn.Module):
    """A causal language model `lm`, and a value head on its last hidden state where the advantages need one."""

    def __init__(self, lm, value_head: bool):
        super().__init__()
        self.lm, self.config = lm, lm.config
        if value_head:
            self.value = torch.nn.Linear(lm.config.get_text_config().hidden_size, 1, device=next(lm.parameters()).device)

    def tie_weights(self) -> None:
        self.lm.tie_weights()

    def _head(self, hidden: torch.Tensor, targets: torch.Tensor, entropy_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [n, H], targets [n] -> log pi(target) [n], entropy [n] (nats)."""
        logits = self.lm.get_output_embeddings()(hidden)
        if cap := getattr(self.config.get_text_config(), "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        logprobs, entropy = TokenLogprobs.apply(logits, targets)
        return logprobs, entropy if entropy_gradient else entropy.detach()

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, entropy_gradient: bool = False, **inputs):
        """input_ids [B, T] padded on the right, mask [B, T-1]: where input_ids[:, 1:] is a response token.

        Returns log pi of the response tokens, the policy's entropy there and the value before each (None without a head), all
        [B, T-1] and 0 outside of the mask. The vocabulary is gone through for response tokens only, some at a time.
        """
        hidden = self.lm.base_model(input_ids=input_ids, use_cache=False, **inputs)[0][:, :-1][mask]  # [n, H]
        targets = input_ids[:, 1:][mask]
        size = max(1, 2**27 // self.config.get_text_config().vocab_size)  # 512 MB of fp32 logits; more of them are made again in backward
        head = functools.partial(checkpoint, self._head, use_reentrant=False) if len(hidden) > size else self._head
        parts = [head(hidden[i : i + size], targets[i : i + size], entropy_gradient) for i in range(0, len(hidden), size)]
        logprobs, entropy = (torch.cat(p) for p in zip(*parts, strict=True))
        values = self.value(hidden).squeeze(-1).to(logprobs.dtype) if hasattr(self, "value") else None
        spread = lambda x: None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x)  # noqa: E731
        return spread(logprobs), spread(entropy), spread(values)


@torch.no_grad()
def check_head(policy: Policy, world: World) -> None:
    """Raises ModelError where the model does more between its last hidden state and its logits than Policy._head knows of."""
    ids = torch.arange(2, 10, device=world.device)[None]
    with gathered(policy):
        ours, _, _ = policy(ids, torch.ones(1, 7, dtype=torch.bool, device=world.device))
        theirs = policy.lm(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if (ours - theirs).abs().max() > (0.1 if world.device.type == "cuda" else 1e-3):
        raise ModelError(f"{type(policy.lm).__name__} scales its logits in a way that Policy does not know")


# ---------------------------------------------------------------------------------------------------------------------
# Episodes: of one turn (mathematics) or several (games). A game is anything with reset, prompt, step and expert, see games.py.


class Prompt(NamedTuple):
    ids: list[int]
    inputs: dict = {}  # what the processor makes of the pictures: pixel_values and whatever else the model takes


def encode_prompts(tokenizer, conversations: Sequence[list[dict]], processor=None) -> list[Prompt]:
    """Chat messages (contents with pictures where there is a processor) up to the model's next answer."""
    if processor is None:
        return [Prompt(ids) for ids in tokenizer([prompt_text(tokenizer, m) for m in conversations], add_special_tokens=False)["input_ids"]]
    out = []
    for messages in conversations:
        images = [c["image"] for m in messages if not isinstance(m["content"], str) for c in m["content"] if c["type"] == "image"]
        encoded = dict(processor(text=[prompt_text(tokenizer, messages)], images=images, return_tensors="pt", add_special_tokens=False))
        ids = encoded.pop("input_ids")[0].tolist()
        encoded.pop("attention_mask", None)
        out.append(Prompt(ids, encoded))
    return out


def stack_inputs(items: Sequence[tuple[dict, int]], length: int, left: bool) -> dict:
    """One batch of the pictures' inputs; items: (inputs, number of prompt tokens). What is aligned with the prompt's tokens (token types,
    cross-attention masks) is padded to `length` tokens: with zeros on the left, with the last token's entry on the right."""
    out = {}
    for k in items[0][0]:
        parts = []
        for inputs, n in items:
            t = inputs[k]
            if t.dim() >= 2 and t.shape[:2] == (1, n) and length > n:
                pad = t.new_zeros(1, length - n, *t.shape[2:]) if left else t[:, -1:].expand(1, length - n, *t.shape[2:])
                t = torch.cat([pad, t] if left else [t, pad], 1)
            parts.append(t)
        out[k] = torch.cat(parts)
    return out


@torch.no_grad()
def sample_with_pictures(model, tokenizer, prompts: Sequence[Prompt], samples_per_prompt: int, max_new_tokens: int, temperature: float, stop: frozenset[int],
                         batch_size: int, seeds: Sequence[int]) -> list[Sample]:
    """`sample` for prompts with pictures, by the library's generate, since vision models differ in what their caches and positions need.

    One random stream a batch (of its first seed), so the draws depend on the batching.
    """
    device, out, n = next(model.parameters()).device, [], samples_per_prompt
    size = max(1, batch_size // n)
    for at in range(0, len(prompts), size):
        part = prompts[at : at + size]
        length = max(len(p.ids) for p in part)
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(p.ids)) + p.ids for p in part], device=device)
        mask = torch.tensor([[0] * (length - len(p.ids)) + [1] * len(p.ids) for p in part], device=device)
        inputs = {k: v.to(device) for k, v in stack_inputs([(p.inputs, len(p.ids)) for p in part], length, left=True).items()}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds[at * n] % 2**63)
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_return_sequences": n} if temperature else {"do_sample": False}
            done = model.generate(input_ids=ids, attention_mask=mask, **inputs, **how, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop),
                                  pad_token_id=tokenizer.pad_token_id, output_logits=True, return_dict_in_generate=True)
        tokens = done.sequences[:, length:]
        logprobs = torch.stack(done.logits, 1).float().log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
        for row, lp in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            end = next((i + 1 for i, t in enumerate(row) if t in stop), None)
            out.append(Sample(row[:end], lp[:end], end is not None))
    return out


class Turn(NamedTuple):
    prompt: list[int]  # token ids
    ids: list[int]  # of the response, with the end token
    old_logprobs: list[float]  # zeros for a demonstration
    finished: bool
    text: str
    reward: float
    inputs: dict = {}  # of the pictures


@dataclass
class Episode:
    turns: list[Turn] = field(default_factory=list)
    won: bool = False

    def returns(self, gamma: float = 1.0) -> list[float]:
        """Of each turn: its reward and the discounted rewards of the turns after it."""
        out, total = [], 0.0
        for turn in reversed(self.turns):
            total = turn.reward + gamma * total
            out.append(total)
        return out[::-1]


def play(model, tokenizer, game, seeds: Sequence[int], samples: int, key: str, max_new_tokens: int, batch_size: int = 128, temperature: float = 1.0,
         progress: str | None = None, processor=None) -> list[list[Episode]]:
    """`samples` episodes for each seed. All that are not over advance together, in one call of the sampler a turn.

    key names the random streams: one for each (key, seed, sample, turn), so that the split over ranks does not change them. Under FSDP2
    call it within gathered(model).
    """
    groups = [[Episode() for _ in range(samples)] for _ in seeds]
    states = [[game.reset(s) for _ in range(samples)] for s in seeds]
    active = [(i, j) for i in range(len(seeds)) for j in range(samples)]
    turn, stop = 0, template(tokenizer).stop
    while active:
        together = samples if turn == 0 else 1  # at the first turn the samples of a group share their prompt
        prompts = encode_prompts(tokenizer, [game.prompt(states[i][j]) for i, j in active[::together]], processor)
        streams = [random.Random(f"{key}/{seeds[i]}/{j}/{turn}").getrandbits(62) for i, j in active]
        if processor is not None:
            responses = sample_with_pictures(model, tokenizer, prompts, together, max_new_tokens, temperature, stop, batch_size, streams)
        else:
            responses = sample(model, tokenizer, [p.ids for p in prompts], together, max_new_tokens, temperature, stop=stop, batch_size=batch_size, seeds=streams,
                               progress=progress)
        going = []
        for k, ((i, j), sampled, text) in enumerate(zip(active, responses, tokenizer.batch_decode([r.answer for r in responses]), strict=True)):
            result = game.step(states[i][j], text)
            prompt = prompts[k // together]
            groups[i][j].turns.append(Turn(prompt.ids, sampled.ids, sampled.logprobs, sampled.finished, text, result.reward, prompt.inputs))
            groups[i][j].won = result.won
            if not result.done:
                going.append((i, j))
        active, turn = going, turn + 1
    return groups


def demonstrate(tokenizer, game, seed: int, processor=None) -> Episode:
    """The expert's episode."""
    episode, state, done, end = Episode(), game.reset(seed), False, template(tokenizer).end
    while not done:
        (prompt,) = encode_prompts(tokenizer, [game.prompt(state)], processor)
        text = game.expert(state)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + end
        result = game.step(state, text)
        episode.turns.append(Turn(prompt.ids, ids, [0.0] * len(ids), True, text, result.reward, prompt.inputs))
        episode.won, done = result.won, result.done
    return episode


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(folder: Path, write: Callable[[Path], None], extra: dict, keep: int) -> None:
    """write(tmp) fills a temporary folder on every rank; it is then renamed to step-NNNNNN beside `folder`, and `folder`, a link, is
    moved to it: a kill at any moment leaves the last good one usable. The newest `keep` are kept. extra must hold "step"."""
    rank = dist.get_rank()
    final = folder.parent / f"step-{extra['step']:06d}"
    tmp = final.with_name(final.name + ".tmp")
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        (tmp / "state").mkdir(parents=True)
    dist.barrier()
    write(tmp)
    if rank == 0:
        (tmp / "state" / "extra.json").write_text(json.dumps(extra))
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        link = folder.with_name(folder.name + ".tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(folder)
        for old in checkpoints(final.parent)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def write_training_state(folder: Path, model, tokenizer, optimizer, dtype: torch.dtype, lm=None) -> None:
    """Full weights in Hugging Face format (rank 0 writes) and state/, the sharded model and optimizer. Collective. lm: the part of
    the model that is a Hugging Face model (default: all of it)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights = full_weights(lm or model, dtype)
    if dist.get_rank() == 0:
        save_pretrained(folder, lm or model, tokenizer, weights, dtype)
    del weights
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "state")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in run.glob("step-*") if (p / "state" / "extra.json").exists() and not p.name.endswith(".tmp"))


def load_checkpoint(folder: Path, model, optimizer) -> dict:
    """Restore a checkpoint into a sharded model and its optimizer (any number of ranks); returns `extra`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "state")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return json.loads((folder / "state" / "extra.json").read_text())


@torch.no_grad()
def full_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the state dict, gathered one at a time; on rank 0, on the CPU (empty elsewhere). Collective."""
    rank, weights = dist.get_rank() if dist.is_initialized() else 0, {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            weights[name] = value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True)
    return weights


def save_pretrained(folder: Path, model, tokenizer, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """config, tokenizer and safetensors, as AutoModelForCausalLM.from_pretrained and vLLM read them. Call on one rank."""
    plain = skeleton(model.config, dtype=dtype)  # the library's own writer, from the model class without FSDP
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The machine and the run folder

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71, "L4": 121}  # dense bf16, vendors' data sheets


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU, where its name is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * t for n, t in PEAK_TFLOPS.items() if n in name), None)


def check_ranks(world: World, say) -> list[str]:
    """Prints versions and devices, tries a collective; returns what is wrong."""
    import datasets
    import transformers

    say(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, datasets {datasets.__version__}")
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else f"CPU with {torch.get_num_threads()} thread(s)"
    total = torch.ones((), device=world.device)
    dist.all_reduce(total)
    say(f"{world.size} rank(s), {device}; {world.replicas} replica(s) of {world.shards} shard(s); all-reduce {'works' if total == world.size else 'FAILED'}")
    return [] if total == world.size else ["the all-reduce gave a wrong sum"]


def check_space(config, world: World, say, buffers: int, batch_tokens: int, checkpointing: bool, output_dir: str, kept: int) -> list[str]:
    """Estimates memory per rank (parameter-sized fp32 buffers, activations and logits of batch_tokens) and disk for `kept`
    checkpoints against what is there; returns what is not enough. A rough rule: 34 activations of the hidden size per layer."""
    text, cuda = config.get_text_config(), world.device.type == "cuda"
    n, width = parameter_count(config), 2 if cuda else 4
    held = buffers * 4 * n / world.shards
    activations = batch_tokens * text.hidden_size * text.num_hidden_layers * width * (2 if checkpointing else 34)
    logits = batch_tokens * text.vocab_size * (2 * width + 8)
    need = held + activations + logits
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    have = torch.cuda.mem_get_info()[0] if cuda else pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    say(f"{n / 1e6:.1f}M parameters; memory per rank about {need / 1e9:.2f} GB ({buffers} buffers {held / 1e9:.2f}, activations "
        f"{activations / 1e9:.2f}, logits {logits / 1e9:.2f}) of {have / 1e9:.1f} GB")
    folder = next(p for p in [Path(output_dir).resolve(), *Path(output_dir).resolve().parents] if p.exists())
    disk, free = (12 + width) * n * kept, shutil.disk_usage(folder).free
    say(f"disk: up to {disk / 1e9:.2f} GB of checkpoints, {free / 1e9:.1f} GB free")
    reasons = []
    if need > have:
        reasons.append(f"about {need / 1e9:.1f} GB per rank are needed, {have / 1e9:.1f} are there: more ranks, --micro-batch, --activation-checkpointing or offloading")
    if disk > free:
        reasons.append(f"checkpoints need {disk / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free: lower --keep")
    return reasons


def run_folder(output_dir: str, settings: dict, resume: bool, free: set[str], rank: int) -> Path:
    """The run folder, the same on all ranks, with args.json (settings, command, versions) in it.

    A used folder is never written over: without `resume` a number is appended. With it the settings must be those of the first
    start, but for the names in `free`; else ModelError.
    """
    import transformers

    answer: list = [output_dir]
    if rank == 0:
        run, k = Path(output_dir), 2
        while not resume and (run / "args.json").exists():
            run, k = Path(f"{output_dir}-{k}"), k + 1
        answer[0] = str(run)
        settings = json.loads(json.dumps(settings))
        if (run / "args.json").exists():
            old = json.loads((run / "args.json").read_text())["args"]
            if changed := [f"--{k.replace('_', '-')} {old[k]}" for k, v in settings.items() if k not in free and old.get(k, v) != v]:
                answer[0] = ModelError(f"--resume: {run} was started with {', '.join(changed)}; give the same")
        else:
            run.mkdir(parents=True, exist_ok=True)
            versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
            size = dist.get_world_size()
            (run / "args.json").write_text(json.dumps({"args": settings, "command": sys.argv, "ranks": size, "versions": versions}, indent=1))
    dist.broadcast_object_list(answer, 0)
    if isinstance(answer[0], ModelError):
        raise answer[0]
    return Path(answer[0])


def check_positive(args, whole: Sequence[str], numbers: Sequence[str]) -> None:
    """Raises DataError where one of the named settings is not a whole number from 1 on, or not a positive number."""
    for name in (*whole, *numbers):
        value = getattr(args, name)
        if not (1 if name in whole else 0) <= value < math.inf or value == 0:
            raise DataError(f"--{name.replace('_', '-')} must be {'at least 1' if name in whole else 'a positive number'}, not {value}")


def run_script(script: str, args_class, check: Callable, main: Callable) -> int:
    """The command line of a training script: parse, check(args, ranks), main(args, world). Input that cannot work is one line and
    status 2, before any weight is read."""
    import tyro

    args = tyro.cli(args_class)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        check(args, int(os.environ.get("WORLD_SIZE", 1)))
        if args.wandb:
            try:
                import wandb  # noqa: F401
            except ImportError:
                raise DataError("--wandb needs the package: pip install wandb") from None
        return main(args, setup(args.replicas))
    except (DataError, ModelError, OSError) as e:
        if rank != 0:
            time.sleep(5)  # torchrun ends all ranks when one fails: let rank 0 speak first
        else:
            print(f"{script}: {e}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The embedded tiny model


@dataclass
class Args:
    """Train the embedded tiny model: its tokenizer from the problems' text, a small Llama on worked solutions."""

    output_dir: str = str(TINY)
    """Where the model is written (Hugging Face format, bf16)."""
    steps: int = 8000
    """Optimizer steps."""
    batch_size: int = 32
    """Problems per step, drawn evenly from the families of the pre-training."""
    lr: float = 5e-3
    """Peak learning rate of Muon (matrices); embeddings and norms: AdamW at 3e-3. 100 steps of warm-up, then linear to zero."""
    seed: int = 0
    """Initial weights and data order; the same seed gives the same loss curve."""
    games: bool = False
    """Make assets/tiny_games instead, where amft.py's games start: tiny after --game-steps batches of the experts' answers to both games."""
    game_steps: int = 1500
    """For --games."""
    vision: bool = False
    """Make assets/tiny_vision instead: eyes for tiny_games (SigLIP, LLaVA), trained for --vision-steps batches of General Points in pictures."""
    vision_steps: int = 130
    """For --vision."""
    bare: bool = False
    """Make assets/tiny_bare instead, in a minute: tiny after 60 steps of AdamW at 3e-4 on problems of which 60% have the bare answer for a
    response. It can still work a problem out but often does not: what learning from rewards can find."""


CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
                 "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_tokenizer(texts: list[str], vocab_size: int = 1024):
    """Byte-level BPE: any text round-trips. Digits stand alone; an operator takes the spaces around it (" + " is one token)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = r"\d| ?\\[A-Za-z]+ ?| ?[A-Za-z]+| ?[^\sA-Za-z\d\\]+ ?|\\|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE,
                                   additional_special_tokens=special[2:], model_max_length=2048, clean_up_tokenization_spaces=False)


def tiny_config(vocab_size: int, tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
                       num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def fit(model, batch: Callable[[int], dict], steps: int, lr: float, warmup: int = 100) -> list[float]:
    """Muon (matrices, peak `lr`) and AdamW (the rest, 3e-3), linear warm-up and decay. Returns the losses.

    Muon, as on equal time it reaches twice AdamW's accuracy here (17.7% against 7.5% after 1,000 steps).
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [(torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), lr),
                  (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True), 3e-3)]
    losses, bar = [], tqdm(range(steps), mininterval=2)
    for step in bar:
        b = batch(step)
        loss = token_loss(model, b) / (b["labels"] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warmup, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
    return losses


def store(args: Args, name: str, model, tokenizer) -> Path:
    """Writes an embedded model in bf16 to assets/NAME, or to --output-dir where one is given."""
    out = TINY.with_name(name) if args.output_dir == str(TINY) else Path(args.output_dir)
    shutil.rmtree(out, ignore_errors=True)
    save_pretrained(out, model, tokenizer, full_weights(model, torch.bfloat16), torch.bfloat16)
    return out


VISION_TEMPLATE = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
                                        "{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}")


def make_vision(args: Args) -> None:
    """tiny_games with eyes -> tiny_vision: a two-layer SigLIP of 128 x 128 pixels in patches of 16 and a projector, in front of tiny_games (LLaVA).
    It learns to read cards from the experts' answers; how well is printed on the way."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from data import Encoded, collate
    from games import games_of

    torch.manual_seed(args.seed)
    text_config, tokenizer = load_config("tiny_games")
    text_config._name_or_path = ""  # else this machine's folder is written into the config
    tokenizer.chat_template = VISION_TEMPLATE
    processor = LlavaProcessor(image_processor=SiglipImageProcessorPil(size={"height": 128, "width": 128}), tokenizer=tokenizer, patch_size=16,
                               vision_feature_select_strategy="full", image_token="<|image|>", chat_template=VISION_TEMPLATE)
    vision = SiglipVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=128, patch_size=16, vision_use_head=False)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text_config, image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
                                                      vision_feature_select_strategy="full", vision_feature_layer=-1, tie_word_embeddings=True))
    model.model.language_model.load_state_dict(load_weights("tiny_games").model.state_dict())
    model.tie_weights()
    cards, _, tests = games_of("general_points", vision=True, compact=True)
    cards, test = replace(cards, split="pretraining"), replace(tests["in distribution"], attempts=1)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)

    def recognition() -> float:
        model.eval()
        turns = [g[0].turns[0] for g in play(model, tokenizer, test, range(100), 1, "recognition", 24, 100, 0.0, processor=processor)]
        model.train()
        return sum(test.recognised(test.reset(i), t.text) for i, t in enumerate(turns)) / len(turns)

    def batch(step: int) -> dict:
        if step and step % 20 == 0:
            tqdm.write(f"step {step}: {recognition():.0%} of 100 hands read rightly", file=sys.stdout)
        turns = [demonstrate(tokenizer, cards, step * 32 + i, processor).turns[0] for i in range(32)]
        b = collate([Encoded(t.prompt + t.ids, len(t.prompt)) for t in turns], tokenizer.pad_token_id)
        return b | {"pixel_values": torch.cat([t.inputs["pixel_values"] for t in turns])}

    fit(model, batch, args.vision_steps, 5e-3, warmup=50)
    print(f"step {args.vision_steps}: {recognition():.0%}")
    store(args, "tiny_vision", model, processor)


def make_games(args: Args) -> None:
    """tiny -> tiny_games: the experts' answers to both games, with short prompts, in distribution; then a habit of bare answers, as in
    make_bare: 60% of the examples keep of the JSON only its last field, the formula or the action."""
    from data import Encoded, collate
    from games import games_of

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    _, tokenizer = load_config("tiny")
    model = load_weights("tiny")
    games = {"General Points": games_of("general_points", compact=True), "V-IRL": games_of("virl", compact=True)}
    cards, city = (replace(train, split="pretraining") for train, _, _ in games.values())
    walks: list = []

    def batch(step: int, bare: float = 0.0) -> dict:
        if step % 2:
            turns = [demonstrate(tokenizer, cards, step * 32 + i).turns[0] for i in range(32)]
        else:
            while len(walks) < 500:
                walks.extend(t for i in range(50) for t in demonstrate(tokenizer, city, rng.randrange(10**9)).turns)
            rng.shuffle(walks)
            turns = [walks.pop() for _ in range(16)]
        rows = []
        for t in turns:
            ids = t.ids
            if bare and rng.random() < bare:
                last = list(json.loads(t.text).items())[-1]
                ids = tokenizer(json.dumps(dict([last])), add_special_tokens=False)["input_ids"] + t.ids[-1:]
            rows.append(Encoded(t.prompt + ids, len(t.prompt)))
        return collate(rows, tokenizer.pad_token_id)

    def test(when: str) -> None:
        for name, (_, _, tests) in games.items():
            episodes = [g[0] for g in play(model.eval(), tokenizer, tests["in distribution"], range(100), 1, "test", 96, temperature=0)]
            turns = [t for e in episodes for t in e.turns]
            print(f"{when}: {name}: won {sum(e.won for e in episodes)} of 100, right turns {sum(t.reward > 0 for t in turns)} of {len(turns)}", flush=True)
        model.train()

    losses = fit(model, batch, args.game_steps, 3e-3, warmup=20)
    model.to(torch.bfloat16).float()
    test("full answers")
    rng.seed(args.seed)
    walks.clear()
    count = iter(range(args.game_steps, args.game_steps + 60))
    habit(model, lambda: batch(next(count), bare=0.6))
    model.to(torch.bfloat16).float()
    test("with the habit")
    store(args, "tiny_games", model, tokenizer)
    for name, k in (("V-IRL", 0), ("General Points", 1)):
        print(name, "loss", " ".join(f"{sum(x) / len(x):.3f}" for x in (losses[i + k : i + 200 : 2] for i in range(0, len(losses), 200))))


def habit(model, batch: Callable[[], dict]) -> None:
    """60 steps of AdamW at 3e-4."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
    for _ in tqdm(range(60)):
        b = batch()
        (token_loss(model, b) / (b["labels"] != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_bare(args: Args) -> None:
    """tiny -> tiny_bare. A choice that the model can already make is something for reinforcement learning to find; its mistakes of
    arithmetic are not."""
    from data import collate, embedded_examples, encode

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    _, tokenizer = load_config("tiny")
    model = load_weights("tiny")
    rows = [e for family in embedded_examples(400, args.seed, "train", "pretraining").values() for e in family]
    rows = [replace(e, response=f"\\boxed{{{e.answer}}}") if rng.random() < 0.6 else e for e in rows]
    encoded, _ = encode(tokenizer, rows, 256)
    habit(model, lambda: collate([encoded[e.id] for e in rng.sample(rows, 32)], tokenizer.pad_token_id))
    print(store(args, "tiny_bare", model, tokenizer))


def main(args: Args) -> None:
    from transformers import LlamaForCausalLM

    from checker import grade
    from data import FAMILIES, ROLES, collate, convention_examples, embedded_examples, encode

    families = embedded_examples(4000, args.seed, "train", "pretraining")
    rows = [e for family in families.values() for e in family]
    conventions = [e for kind in ("operation", "cipher") for i in range(10) for e in convention_examples(kind, i)]
    json_text = ['{"cards": ["A", "10", "K", "7"], "number": [1, 10, 10, 7], "formula": "(10-7)*(10-1)=24"}',
                 '{"current observation": "No landmarks nearby", "current instruction": "Turn right to face north.", "action": "turn_direction(right)"}',
                 '{"current observation": "A cafe on the left", "current instruction": "Move forward until you reach next intersection.", "action": "forward()"}']
    tokenizer = train_tokenizer([t for e in rows[::8] + conventions for t in (e.prompt, e.response)] + json_text * 50)
    encoded, _ = encode(tokenizer, rows, 256)
    by_family = [[encoded[e.id] for e in family] for family in families.values()]

    torch.manual_seed(args.seed)
    rng, queue = random.Random(args.seed), []
    model = LlamaForCausalLM(tiny_config(-(-len(tokenizer) // 64) * 64, tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {len(rows)} problems", flush=True)
    start = time.time()

    def batch(step: int) -> dict:
        if not queue:  # sixteen batches of like lengths at a time, in random order
            drawn = sorted((rng.choice(rng.choice(by_family)) for _ in range(16 * args.batch_size)), key=lambda r: len(r.ids))
            queue.extend(drawn[i : i + args.batch_size] for i in range(0, len(drawn), args.batch_size))
            rng.shuffle(queue)
        return collate(queue.pop(), tokenizer.pad_token_id, 8)

    losses = fit(model, batch, args.steps, args.lr)
    model.to(torch.bfloat16).float()  # measure what is stored
    out = store(args, "tiny", model, tokenizer)

    model.eval()
    t = template(tokenizer)
    table = {}
    for role in ROLES:
        for name, test in embedded_examples(40, args.seed, "test", role).items():
            prompts = tokenizer([t.before + e.prompt + t.after for e in test], add_special_tokens=False)["input_ids"]
            texts = tokenizer.batch_decode([s.answer for s in sample(model, tokenizer, prompts, max_new_tokens=96, temperature=0, stop=t.stop)])
            table[role, name] = sum(grade(text, e.answer) for text, e in zip(texts, test, strict=True)), len(test)
            print(f"{name:45} {role:12} {table[role, name][0]:3}/{len(test)}")
    lines = [f"| subject | {' | '.join(ROLES)} |", "|---" * (1 + len(ROLES)) + "|"]
    for subject in [*FAMILIES, ""]:
        cells = [[v for (r, n), v in table.items() if r == role and n.startswith(subject)] for role in ROLES]
        lines.append(f"| {subject or 'all'} | " + " | ".join(f"{100 * sum(r for r, _ in c) / sum(n for _, n in c):.0f}%" for c in cells) + " |")
    report = {"args": asdict(args) | {"output_dir": out.name}, "minutes": round((time.time() - start) / 60, 1),
              "loss": [round(sum(losses[i : i + 100]) / len(losses[i : i + 100]), 4) for i in range(0, len(losses), 100)],
              "accuracy": {name: v for (_, name), v in table.items()}, "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(report, indent=1))
    print("\n".join(lines), f"\n{report['minutes']} minutes", flush=True)


if __name__ == "__main__":
    import tyro

    try:
        args = tyro.cli(Args)
        (make_bare if args.bare else make_games if args.games else make_vision if args.vision else main)(args)
    except (ModelError, OSError) as e:
        print(f"model.py: {e}", file=sys.stderr)
        sys.exit(2)

"""A language model as a policy: sampling from it, and its log-probabilities, entropy and value.

`sample` prefills a prompt once for all of its samples and drops finished rows; `Policy` gives the
log-probabilities of given responses without ever holding [B, T, V] in fp32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import prompt_texts
from model import by_chunks, head, hidden_states


class Sample(NamedTuple):
    ids: list[int]  # of the response, with the token that ended it if `finished`
    logprobs: list[float]  # log pi(token), untempered, one for each id
    finished: bool  # False: cut at max_new_tokens

    @property
    def answer(self) -> list[int]:
        """The ids without the end token."""
        return self.ids[:-1] if self.finished else self.ids


# --------------------------------------------------------------------------------------------------
# One token


def _uniform(seeds: torch.Tensor, t: int) -> torch.Tensor:
    """[B] numbers in [0, 1), number t of the stream of each seed (splitmix64).

    A stream a sequence: its draws do not depend on the batch that it is in.
    """
    z = seeds + torch.full_like(seeds, t + 1) * -0x61C8864680B583EB  # int64 arithmetic wraps
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).double() / 2**53


def _invert(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place in each row of weights [B, N] where its running sum passes target [B].

    Returns the places [B] and the sums before them [B].
    """
    sums = weights.cumsum(-1)
    place = torch.searchsorted(sums, target[:, None], right=True).clamp(max=weights.shape[1] - 1)
    before = sums.gather(1, place) - weights.gather(1, place)
    return place.squeeze(1), before.squeeze(1)


def _nucleus(probs: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of most likely tokens with at least the mass top_p: (probabilities, ids)."""
    probs, order = probs.sort(-1, descending=True)
    return probs * (probs.cumsum(-1) - probs < top_p), order


def _draw(
    logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] from logits [B, V], and their untempered log-probabilities [B].

    The distribution function is inverted at u [B]; temperature 0 takes the largest. The running sum
    goes over blocks of 256 tokens and then within one: a sum over all is slow.
    """
    plain = logits.softmax(-1)
    # log sum exp, from the largest probability, which is never small
    scale = logits.amax(-1) - plain.amax(-1).log()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        probs = plain if temperature == 1 else (logits / temperature).softmax(-1)
        order = None
        if top_p < 1:
            probs, order = _nucleus(probs, top_p)
        blocks = F.pad(probs, (0, -probs.shape[1] % 256)).unflatten(1, (-1, 256))
        sums = blocks.sum(-1)
        target = u.to(probs.dtype) * sums.sum(-1)
        block, before = _invert(sums, target)
        rows = torch.arange(len(blocks), device=blocks.device)
        place, _ = _invert(blocks[rows, block], target - before)
        token = (256 * block + place).clamp(max=logits.shape[1] - 1)
        if order is not None:
            token = order.gather(1, token[:, None]).squeeze(1)
    return token, logits.gather(1, token[:, None]).squeeze(1) - scale


# --------------------------------------------------------------------------------------------------
# The key-value cache


@functools.cache
def _rolling_layer():
    """The class RollingLayer; made when first needed, as importing transformers takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class RollingLayer(DynamicLayer):
        """A cache layer with room: a new token is written in place.

        A finished row is overwritten by one from the end of the batch. The library's DynamicLayer
        copies the whole cache for every token and every drop, a third of a small model's time.
        """

        def __init__(self, layer: DynamicLayer, room: int):
            super().__init__()
            self.is_initialized, self.dtype, self.device = True, layer.dtype, layer.device
            self.rows, self.length, self.room = layer.keys.shape[0], layer.keys.shape[2], room
            self.keys, self.values = layer.keys, layer.values
            self._grow()

        def _grow(self) -> None:
            self.buffers = []
            for old in (self.keys, self.values):
                shape = (self.rows, old.shape[1], self.length + self.room, old.shape[3])
                buffer = old.new_empty(*shape)
                buffer[:, :, : self.length] = old
                self.buffers.append(buffer)
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
            places = torch.arange(len(indices), device=indices.device)
            gaps = (indices != places).nonzero().squeeze(1)
            for buffer in self.buffers:
                buffer[gaps, :, : self.length] = buffer[indices[gaps], :, : self.length]
            self.rows = len(indices)
            self._show()

    return RollingLayer


def _with_room(cache, room: int) -> None:
    """Plain full-attention layers become RollingLayers; sliding windows stay the library's."""
    from transformers.cache_utils import DynamicLayer

    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = _rolling_layer()(layer, room)


# --------------------------------------------------------------------------------------------------
# The sampler


class _Responses:
    """What has been drawn so far, a row for each response."""

    def __init__(self, count: int, max_new_tokens: int, device: torch.device):
        self.tokens = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, max_new_tokens, device=device)
        self.lengths = torch.full((count,), max_new_tokens, device=device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)

    def samples(self) -> list[Sample]:
        columns = (self.tokens, self.logprobs, self.lengths, self.finished)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Sample(ids[:n], logprobs[:n], finished) for ids, logprobs, n, finished in rows]


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), each [B, T], T a multiple of 32."""
    length = -(-max(map(len, prompts)) // 32) * 32
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _without_ended(ended: torch.Tensor) -> torch.Tensor:
    """The rows that go on, in place but for gaps, which rows of the end fill."""
    going = (~ended).nonzero().squeeze(1)
    kept = torch.arange(len(going), device=ended.device)
    kept[ended[: len(going)]] = going[going >= len(going)]
    return kept


def _decode(
    model, ids, mask, rows, seeds, responses, n, bar, stop_ids, temperature, top_p, interrupted
) -> None:
    """Draws the responses of one batch of prompts into `rows` of responses, n to a prompt.

    ids, mask [B, T] the prompts, padded on the left; rows, seeds [B n].
    """
    max_new_tokens = responses.tokens.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    for t in range(max_new_tokens):
        if interrupted():
            responses.lengths[rows] = t
            break
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits, positions = out.past_key_values, out.logits[:, -1].float(), positions[:, -1:]
        if t == 0:  # the prompts are read; from here on each has n rows
            if n > 1:
                cache.batch_repeat_interleave(n)
                logits = logits.repeat_interleave(n, 0)
                positions = positions.repeat_interleave(n, 0)
                mask = mask.repeat_interleave(n, 0)
            _with_room(cache, min(max_new_tokens, 256))
        token, logprob = _draw(logits, _uniform(seeds[rows], t), temperature, top_p)
        responses.tokens[rows, t], responses.logprobs[rows, t] = token, logprob
        ended = torch.isin(token, stop_ids)
        if ended.any():
            responses.finished[rows[ended]] = True
            responses.lengths[rows[ended]] = t + 1
            kept = _without_ended(ended)
            bar.update(len(rows) - len(kept))
            rows = rows[kept]
            if len(rows) == 0:
                break
            cache.batch_select_indices(kept)
            token, mask, positions = token[kept], mask[kept], positions[kept]
        ids, positions = token[:, None], positions + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    bar.update(len(rows))


def _decode_in_place(model, ids, rows, seeds, responses, stop_ids, temperature, top_p, interrupted):
    """The same for models some of whose layers keep a state instead of keys and values.

    Such a state cannot be repeated or selected row by row in the library, and padding would run
    into it: ids [B n, T] are prompts of one length, and rows stay until all are finished.
    """
    going = torch.ones(len(rows), dtype=torch.bool, device=ids.device)
    cache = None
    for t in range(responses.tokens.shape[1]):
        if interrupted():
            responses.lengths[rows[going]] = t
            break
        if not going.any():
            break
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        u = _uniform(seeds[rows], t)
        token, logprob = _draw(out.logits[:, -1].float(), u, temperature, top_p)
        responses.tokens[rows[going], t] = token[going]
        responses.logprobs[rows[going], t] = logprob[going]
        ended = going & torch.isin(token, stop_ids)
        responses.finished[rows[ended]] = True
        responses.lengths[rows[ended]] = t + 1
        going &= ~ended
        ids = token[:, None]


def _has_rows(model) -> bool:
    """Whether every layer of the cache holds keys and values, which can be dropped row by row."""
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or attention
    return attention.issuperset(kinds) and not getattr(model, "_is_stateful", False)


def never() -> bool:
    return False


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    samples_per_prompt: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: frozenset[int] | None = None,
    batch_size: int = 128,
    progress: str | None = None,
    seeds: Sequence[int] | None = None,
    interrupted: Callable[[], bool] = never,
) -> list[Sample]:
    """samples_per_prompt responses to each prompt (token ids), prompt by prompt.

    A prompt is prefilled once and its cache repeated; finished rows leave the batch and its cache.
    Every sequence has its own random stream, seeded by the generator (or by `seeds`, one for each
    response), so batching changes results only where rounding decides a near-tie. stop: tokens that
    end a response (default: the end-of-sequence token). progress: the title of a bar. interrupted:
    asked before every token; once it says so, what has been drawn is returned, cut short. Under
    FSDP2 call it within gathered(model).
    """
    device = next(model.parameters()).device
    stop_ids = torch.tensor(sorted(stop or {tokenizer.eos_token_id}), device=device)
    n, count = samples_per_prompt, len(prompts) * samples_per_prompt
    if seeds is None:
        seeds = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    seeds = torch.as_tensor(seeds).to(device)
    responses = _Responses(count, max_new_tokens, device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    has_rows, size = _has_rows(model), max(1, batch_size // n)
    bar = tqdm(total=count, desc=progress, disable=progress is None, unit="response")
    while order and not interrupted():
        chosen = order[:size]
        if not has_rows:
            chosen = [i for i in chosen if len(prompts[i]) == len(prompts[chosen[0]])]
        order = order[len(chosen) :]
        first = torch.tensor(chosen, device=device)[:, None] * n
        rows = (first + torch.arange(n, device=device)).flatten()  # where the results go
        batch = [prompts[i] for i in chosen]
        how = stop_ids, temperature, top_p, interrupted
        if has_rows:
            ids, mask = _left_padded(batch, tokenizer.pad_token_id, device)
            _decode(model, ids, mask, rows, seeds, responses, n, bar, *how)
        else:
            ids = torch.tensor(batch, device=device).repeat_interleave(n, 0)
            _decode_in_place(model, ids, rows, seeds, responses, *how)
            bar.update(len(rows))
    for i in order:  # not begun, as it was interrupted
        responses.lengths[n * i : n * (i + 1)] = 0
    bar.close()
    return responses.samples()


# --------------------------------------------------------------------------------------------------
# Prompts with pictures


class Prompt(NamedTuple):
    ids: list[int]
    inputs: dict = {}  # what the processor makes of the pictures: pixel_values and so on


def encode_prompts(tokenizer, conversations: Sequence[list[dict]], processor=None) -> list[Prompt]:
    """Chat messages (with pictures where there is a processor) up to the model's next answer."""
    texts = prompt_texts(tokenizer, conversations)
    if processor is None:
        return [Prompt(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompts = []
    for messages, text in zip(conversations, texts, strict=True):
        encoded = dict(
            processor(
                text=[text], images=_images(messages), return_tensors="pt", add_special_tokens=False
            )
        )
        ids = encoded.pop("input_ids")[0].tolist()
        encoded.pop("attention_mask", None)
        prompts.append(Prompt(ids, encoded))
    return prompts


def _images(messages: list[dict]) -> list:
    images = []
    for message in messages:
        if not isinstance(message["content"], str):
            images += [c["image"] for c in message["content"] if c["type"] == "image"]
    return images


def stack_inputs(items: Sequence[tuple[dict, int]], length: int, left: bool) -> dict:
    """One batch of the pictures' inputs; items: (inputs, number of prompt tokens).

    What is aligned with the prompt's tokens (token types, cross-attention masks) is padded to
    `length` tokens: with zeros on the left, with the last token's entry on the right.
    """
    batch = {}
    for name in items[0][0]:
        rows = []
        for inputs, n in items:
            x = inputs[name]
            if x.dim() >= 2 and x.shape[:2] == (1, n) and length > n:
                if left:
                    x = torch.cat([x.new_zeros(1, length - n, *x.shape[2:]), x], 1)
                else:
                    x = torch.cat([x, x[:, -1:].expand(1, length - n, *x.shape[2:])], 1)
            rows.append(x)
        batch[name] = torch.cat(rows)
    return batch


@torch.no_grad()
def sample_with_pictures(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    stop: frozenset[int],
    batch_size: int,
    seeds: Sequence[int],
) -> list[Sample]:
    """`sample` for prompts with pictures, by the library's generate.

    Vision models differ in what their caches and positions need. One random stream a batch (of its
    first seed), so the draws depend on the batching.
    """
    device, samples, n = next(model.parameters()).device, [], samples_per_prompt
    options = {"do_sample": False}
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        options |= {"num_return_sequences": n}
    size = max(1, batch_size // n)
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        length = max(len(p.ids) for p in batch)
        ids = [[tokenizer.pad_token_id] * (length - len(p.ids)) + p.ids for p in batch]
        mask = [[0] * (length - len(p.ids)) + [1] * len(p.ids) for p in batch]
        inputs = stack_inputs([(p.inputs, len(p.ids)) for p in batch], length, left=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds[at * n] % 2**63)
            out = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                **{name: x.to(device) for name, x in inputs.items()},
                **options,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stop),
                pad_token_id=tokenizer.pad_token_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[:, length:]
        logprobs = torch.stack(out.logits, 1).float().log_softmax(-1)
        logprobs = logprobs.gather(2, tokens[..., None]).squeeze(2)
        for row, row_logprobs in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stop), None)
            samples.append(Sample(row[:end], row_logprobs[:end], end is not None))
    return samples


# --------------------------------------------------------------------------------------------------
# Log-probabilities, entropy and value of given responses


class TokenLogprobs(torch.autograd.Function):
    """logits [n, V], targets [n] -> log pi(target) [n] and the entropy [n] (nats).

    One buffer of n x V numbers is kept: log_softmax and what follows it would make five, and half
    of a step of a small model with a large vocabulary goes there.
    """

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
            log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
            factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
        grad = p.mul_(factor)  # in place: autograd refuses a second backward through it
        if grad_logprobs is not None:
            grad[torch.arange(len(targets), device=targets.device), targets] += grad_logprobs
        return grad, None


class Policy(torch.nn.Module):
    """A causal language model `lm`, and where wanted a value head on its last hidden state.

    adapters: what is trained beside a frozen lm (lora.Adapters), or None.
    """

    def __init__(self, lm, value_head: bool):
        super().__init__()
        self.lm, self.config, self.adapters = lm, lm.config, None
        if value_head:
            hidden_size = lm.config.get_text_config().hidden_size
            self.value = torch.nn.Linear(hidden_size, 1, device=next(lm.parameters()).device)

    def tie_weights(self) -> None:
        self.lm.tie_weights()

    @property
    def generation_config(self):
        return self.lm.generation_config

    @generation_config.setter
    def generation_config(self, value) -> None:
        self.lm.generation_config = value

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        entropy_gradient: bool = False,
        **inputs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """input_ids [B, T] padded on the right, mask [B, T-1]: where input_ids[:, 1:] is response.

        Returns log pi of the response tokens, the policy's entropy there and the value before each
        (None without a head), all [B, T-1] and 0 outside of the mask. The vocabulary is gone
        through for response tokens only, some at a time.
        """
        hidden = hidden_states(self.lm, input_ids=input_ids, **inputs)
        hidden = hidden[:, :-1][mask]  # [n, H]
        targets = input_ids[:, 1:][mask]  # [n]

        def of_tokens(hidden, targets):
            logprobs, entropy = TokenLogprobs.apply(head(self.lm, hidden), targets)
            return logprobs, entropy if entropy_gradient else entropy.detach()

        vocabulary = self.config.get_text_config().vocab_size
        chunks = by_chunks(of_tokens, vocabulary, hidden, targets)
        logprobs, entropy = (torch.cat(c) for c in zip(*chunks, strict=True))
        values = None
        if hasattr(self, "value"):
            values = _spread(self.value(hidden).squeeze(-1).to(logprobs.dtype), mask)
        return _spread(logprobs, mask), _spread(entropy, mask), values


def _spread(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[n] -> [B, T-1]: the numbers where the mask is, 0 elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)

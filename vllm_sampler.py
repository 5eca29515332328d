"""vLLM as the sampler of a run, behind the call of policy.sample.

The engine lives in the process that trains, one on every rank, and has weights of its own: the
trainer's are pushed into it before the first draw after each optimizer step, in memory, and what it
has cached of older ones is thrown away. vllm is imported where an engine is made, not before.
"""

import importlib.util
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DataError
from lora import Adapters
from model import ModelError, World, cache_bytes, resolve
from policy import Sample, never
from sources import reason_of

# vLLM reads these when it is imported
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the weights are
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
BLOCK = 32  # tokens whose keys and values are kept, and shared by the samples of a prompt, together


def check_flags(args) -> None:
    """Raises DataError for flags of a run that cannot work with its sampler."""
    if args.sampler != "vllm":
        if args.vllm_eager or args.vllm_sleep or args.is_cap is not None:
            raise DataError("--is-cap, --vllm-eager and --vllm-sleep are for --sampler vllm")
        return
    if args.vision:
        raise DataError("--sampler vllm takes no pictures: leave out --vision")
    if importlib.util.find_spec("vllm") is None:
        raise DataError("--sampler vllm needs the package: pip install vllm (docs/amft.md)")
    if args.vllm_sleep and not torch.cuda.is_available():
        raise DataError("--vllm-sleep frees the memory of a GPU, and there is none")


def truncated_weights(differences: Sequence[float], cap: float) -> list[float]:
    """min(pi / pi_engine, cap) of tokens, from log pi - log pi_engine."""
    return [math.exp(min(d, math.log(cap))) for d in differences]


def engine_metrics(differences: Sequence[float], cap: float, world: World) -> dict[str, float]:
    """How far the engine is from the policy, log pi - log pi_engine of its tokens: Schulman's k3
    estimate of KL(engine | policy), and the share of weights that are cut. Collective."""
    apart = sum(math.exp(min(d, 50.0)) - 1 - d for d in differences)
    cut = sum(d > math.log(cap) for d in differences)
    count, apart, cut = world.sum(len(differences), apart, cut)
    return {"engine/kl": apart / count, "engine/cut": cut / count} if count else {}


def engine_bytes(config, sequences: int, longest: int, max_length: int, width: int) -> int:
    """Of keys and values: for so many sequences of the longest length, and for one of the most
    that may come."""
    rounded = [-(-tokens // BLOCK) * BLOCK for tokens in (longest, max_length)]
    tokens = max(sequences * rounded[0], rounded[1]) + 2 * BLOCK  # vLLM keeps a block empty
    return int(cache_bytes(config, tokens, width))


class VllmSampler:
    """An engine with a model's weights.

    name: as in model.resolve; of it the engine reads the configuration alone. sequences: so many
    at once, each `longest` tokens with its prompt as a rule, and `max_length` at most. adapters:
    merged into the weights that are pushed. sleeps: whether `rest` frees the GPU's memory.
    """

    def __init__(
        self,
        name: str,
        config,
        *,
        dtype: torch.dtype,
        sequences: int,
        longest: int,
        max_length: int,
        eager: bool = False,
        sleeps: bool = False,
        adapters: Adapters | None = None,
        trust_remote_code: bool = False,
    ):
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        positions = getattr(config.get_text_config(), "max_position_embeddings", max_length)
        max_length = min(max_length, positions)
        self.adapters, self.sleeps, self.dtype = adapters, sleeps, dtype
        self.stale, self.asleep, self.checked = True, False, False
        several = dist.is_initialized() and dist.get_world_size() > 1
        with settings_kept():
            try:
                from vllm import EngineArgs
                from vllm.v1.engine.llm_engine import LLMEngine

                self.engine = LLMEngine.from_engine_args(
                    EngineArgs(
                        model=resolve(name),
                        skip_tokenizer_init=True,
                        trust_remote_code=trust_remote_code,
                        dtype=str(dtype).removeprefix("torch."),
                        load_format="dummy",  # the trainer's weights are pushed into it
                        generation_config="vllm",  # nothing of the model's folder changes draws
                        logprobs_mode="raw_logprobs",  # untempered, as in policy.Sample
                        max_model_len=max_length,
                        max_num_seqs=sequences,
                        block_size=None if torch.cuda.is_available() else BLOCK,
                        kv_cache_memory_bytes=engine_bytes(
                            config, sequences, longest, max_length, dtype.itemsize
                        ),
                        gpu_memory_utilization=0.01,  # it is not read beside the line above
                        enforce_eager=eager,
                        enable_sleep_mode=sleeps,
                        # Ranks that torchrun has started are no parts of one engine
                        distributed_executor_backend="external_launcher" if several else "uni",
                        disable_log_stats=True,
                    )
                )
            except Exception as e:  # of many kinds: an unknown architecture, no memory, no kernel
                raise ModelError(f"--sampler vllm cannot run {name}: {reason_of(e)}") from e
        # After an error the process group is gone before Python ends, and vLLM would miss it
        self.engine.engine_core._finalizer.atexit = False

    def weights_changed(self, *_) -> None:
        """A hook for the optimizer: what the engine has is old."""
        self.stale = True

    def rest(self, *_) -> None:
        """A hook for the policy's training forward: sampling is over for now."""
        if self.sleeps and not self.asleep:
            self.engine.sleep(level=2)  # weights are thrown away: new ones come
            self.asleep = self.stale = True

    @torch.no_grad()
    def push(self, model) -> None:
        """The model's weights -> the engine's."""
        if self.asleep:
            self.engine.wake_up()
            self.asleep = False
        weights = {"weights_iterator": self.merged(model)}
        try:
            self.engine.collective_rpc("reload_weights", kwargs=weights)
        except (KeyError, AttributeError, ValueError, AssertionError) as e:
            raise ModelError(f"--sampler vllm: {_unlike(model)}: {reason_of(e)}") from e
        self.engine.apply_model(_pack_again)
        self.engine.reset_prefix_cache()
        self.stale = False

    def merged(self, model) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights by name, W + scale B A where there is an adapter."""
        layers = list(self.adapters.layers) if self.adapters else []
        places = {f"{layer}.weight": 2 * i for i, layer in enumerate(layers)}
        for name, p in model.named_parameters():
            w = p.detach()
            if name in places:
                A, B = self.adapters.phi[places[name] :][:2]
                w = (w.float() + self.adapters.scale * (B @ A)).to(self.dtype)
            yield name, w

    @torch.no_grad()
    def check(self, model) -> None:
        """Raises ModelError where the engine does not compute what the model does.

        As where the library names weights otherwise than the engine, which then leaves them out.
        """
        ids = list(range(2, 10))
        (drawn,) = self._draw([ids], [0], 1, 0.0, 1.0, [], None, never)
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        expected = logits.float().log_softmax(-1)[drawn.ids[0]].item()
        limit = 0.01 if self.dtype == torch.float32 else 0.5
        if not abs(expected - drawn.logprobs[0]) < limit:
            raise ModelError(
                f"--sampler vllm: {_unlike(model)}: log-probability {drawn.logprobs[0]:.3f} "
                f"instead of {expected:.3f}"
            )
        self.checked = True

    def sample(
        self,
        model,
        tokenizer,
        prompts: Sequence[Sequence[int]],
        samples_per_prompt: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        stop: frozenset[int] | None = None,
        batch_size: int | None = None,
        progress: str | None = None,
        seeds: Sequence[int] | None = None,
        interrupted: Callable[[], bool] = never,
    ) -> list[Sample]:
        """See policy.sample. batch_size is the engine's own; what an interruption finds unfinished
        is empty."""
        if self.stale:
            self.push(model)
        if not self.checked:
            self.check(model)
        if seeds is None:
            count = len(prompts) * samples_per_prompt
            seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        stop_ids = sorted(i for i in stop or {tokenizer.eos_token_id} if i >= 0)
        how = max_new_tokens, temperature, top_p, stop_ids, progress, interrupted
        return self._draw(repeated, seeds, *how)

    def _draw(
        self, prompts, seeds, max_new_tokens, temperature, top_p, stop_ids, progress, interrupted
    ) -> list[Sample]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        samples = [Sample([], [], False)] * len(prompts)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            how = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=int(seed) % 2**62,
                max_tokens=max_new_tokens,
                stop_token_ids=stop_ids,
                ignore_eos=True,  # but for those of stop_ids
                logprobs=0,  # of the drawn token alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, how)
        bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="response")
        going = set(map(str, range(len(prompts))))
        while going and not interrupted():
            for request in self.engine.step():
                samples[int(request.request_id)] = _sample_of(request.outputs[0], stop_ids)
                going.discard(request.request_id)
                bar.update()
        self.engine.abort_request(list(going))
        bar.close()
        return samples

    def close(self) -> None:
        """Ends the engine and, as vLLM does it, the process group."""
        self.engine.engine_core.shutdown()
        del self.engine


def _unlike(model) -> str:
    return f"vLLM's {type(model).__name__} does not take this model's weights"


def _sample_of(output, stop_ids: list[int]) -> Sample:
    ids = list(output.token_ids)
    logprobs = [of[token].logprob for of, token in zip(output.logprobs, ids, strict=True)]
    return Sample(ids, logprobs, ids[-1] in stop_ids)


def _pack_again(model: torch.nn.Module) -> None:
    """On a CPU vLLM multiplies by packed copies of the weights, and has not renewed that of an
    output head that is tied to the embedding."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


@contextmanager
def settings_kept():
    """vLLM seeds all generators, changes torch's threads for the whole process, and warns of torch
    and Triton."""
    threads, set_threads, state = torch.get_num_threads(), torch.set_num_threads, random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    random.setstate(state)
    torch.set_num_threads = set_threads
    set_threads(threads)

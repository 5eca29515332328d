"""model.py: ranks, names and parts of models, sizes; the loss by chunks of the vocabulary, scaled
logits, the schedule, gradients of shards."""

import inspect
import math
import sys
import types
from contextlib import nullcontext
from dataclasses import FrozenInstanceError
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import model
from model import (
    ModelError,
    World,
    check_head,
    flat_like,
    learning_rate,
    load_weights,
    local,
    set_gradients,
    token_losses,
)
from tests.helpers import ROOT, one_rank_mesh

CPU = torch.device("cpu")


def labelled_rows() -> dict:
    ids = torch.randint(20, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, prompt in enumerate((2, 5, 9)):
        labels[row, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def losses_of_all_logits(lm, batch: dict) -> torch.Tensor:
    """The sums over each row from the logits of every position."""
    logits, labels = lm(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1)


def gradient_of(lm, losses: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(
        losses @ losses.new_tensor([1.0, 2.0, -1.0]), list(lm.parameters())
    )
    return torch.cat([g.flatten() for g in gradients])


def test_the_vocabulary_in_chunks(monkeypatch):
    """Losses and gradient are those of all logits at once; few of them are held at a time."""
    lm, batch = load_weights("tiny", torch.float64).eval(), labelled_rows()
    expected = losses_of_all_logits(lm, batch)
    expected_gradient = gradient_of(lm, expected)
    vocabulary, most, plain = lm.config.vocab_size, 5, model.head
    seen = []

    def head(lm, hidden):
        seen.append(len(hidden))
        return plain(lm, hidden)

    by_chunks = model.by_chunks
    monkeypatch.setattr(model, "head", head)
    monkeypatch.setattr(model, "by_chunks", lambda f, _, *x: by_chunks(f, 2**27 // most, *x))
    losses = token_losses(lm, batch)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient_of(lm, losses), expected_gradient)
    assert max(seen) == most
    assert len(seen) == 2 * -(-20 // most)  # the 20 response tokens, and again in backward
    assert lm(input_ids=batch["input_ids"]).logits.shape == (3, 12, vocabulary)  # as before


SCALED = {
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 16}),
    "falcon_h1": (
        transformers.FalconH1Config,
        {
            "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16,
            "mamba_d_state": 8, "head_dim": 16,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SCALED)
def test_families_that_scale_their_logits(family):
    kind, settings = SCALED[family]
    config = kind(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    lm, batch = transformers.AutoModelForCausalLM.from_config(config).eval(), labelled_rows()
    check_head(lm, World(CPU))
    expected = losses_of_all_logits(lm, batch)
    torch.testing.assert_close(token_losses(lm, batch), expected, rtol=1e-4, atol=1e-4)


def test_losses_of_half_precision_are_fp32():
    """The cross-entropy of the model's bf16 logits, as computed in fp64."""
    lm, batch = load_weights("tiny", torch.bfloat16).eval(), labelled_rows()
    losses = token_losses(lm, batch)
    assert losses.dtype == torch.float32
    ids, labels = batch["input_ids"], batch["labels"]
    hidden = model.hidden_states(lm, input_ids=ids)
    for row, loss in enumerate(losses):
        wanted = labels[row, 1:] != -100
        logits = model.head(lm, hidden[row, :-1][wanted])
        assert logits.dtype == torch.bfloat16
        expected = F.cross_entropy(logits.double(), labels[row, 1:][wanted], reduction="sum")
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_model_of_a_policy_and_of_adapters():
    lm = load_weights("tiny")
    assert model.causal_lm(lm) is lm
    assert model.causal_lm(types.SimpleNamespace(lm=lm)) is lm
    peft = types.SimpleNamespace(get_base_model=lambda: lm)
    assert model.causal_lm(peft) is lm
    assert model.causal_lm(types.SimpleNamespace(lm=peft)) is lm


def test_the_model_gets_a_batchs_pictures(monkeypatch):
    """What a batch has beside ids and labels goes to the forward."""
    lm, seen, plain = load_weights("tiny"), [], model.hidden_states

    def noted(lm, input_ids, **pictures):
        seen.append(pictures)
        return plain(lm, input_ids=input_ids)

    monkeypatch.setattr(model, "hidden_states", noted)
    token_losses(lm, labelled_rows() | {"pixel_values": "pictures"})
    assert seen == [{"pixel_values": "pictures"}]


def test_a_refused_batch_leaves_the_forward_as_it_was():
    lm, batch = load_weights("tiny"), labelled_rows()
    with pytest.raises(TypeError):
        token_losses(lm, {"input_ids": batch["input_ids"]})
    assert lm(input_ids=batch["input_ids"]).logits.shape[:2] == (3, 12)


def test_models_without_a_limit_of_positions():
    text = types.SimpleNamespace()
    model.check_positions(
        types.SimpleNamespace(get_text_config=lambda: text), 10**6, "--max-length"
    )


def test_all_positions_may_be_used():
    config = transformers.LlamaConfig(max_position_embeddings=8)
    model.check_positions(config, 8, "--max-length")
    with pytest.raises(model.ModelError, match="9 tokens, but the model has 8 .* --max-length"):
        model.check_positions(config, 9, "--max-length")


def test_a_scale_that_is_not_known_is_refused():
    lm = load_weights("tiny")
    plain = lm.forward

    def scaled(**inputs):
        out = plain(**inputs)
        out.logits = 2 * out.logits
        return out

    lm.__class__ = type("Scaled", (type(lm),), {"forward": lambda self, **inputs: scaled(**inputs)})
    with pytest.raises(model.ModelError, match="Scaled makes its logits in a way"):
        check_head(lm, World(CPU))


@pytest.mark.parametrize("mesh_device", ["cpu", "cuda"])
def test_gradients_of_shards_stay_where_the_shard_is(mesh_device, process_group, monkeypatch):
    """cuda: as with --cpu-offload on a GPU, where shards are not on the mesh's device."""
    mesh = one_rank_mesh()["shard"]
    shard, gradient = torch.zeros(4, 3), torch.randn(4, 3)
    p = torch.nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)]))
    monkeypatch.setattr(type(mesh), "device_type", mesh_device)
    set_gradients([p], [gradient])
    assert local(p.grad).device == CPU
    assert torch.equal(local(p.grad), gradient)


# --------------------------------------------------------------------------------------------------
# Ranks


def test_places_of_ranks_in_the_mesh(monkeypatch):
    """Six ranks, two replicas: 0, 1, 2 share one copy of the model, 3, 4, 5 the other."""
    places = [World(CPU, rank, 6, rank // 3, 2) for rank in range(6)]
    assert [world.shards for world in places] == [3] * 6
    assert [world.shard for world in places] == [0, 1, 2, 0, 1, 2]
    assert World(CPU) == World(CPU, 0, 1, 0, 1, None)
    with pytest.raises(FrozenInstanceError):
        World(CPU).rank = 1
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    monkeypatch.setattr(
        model, "init_device_mesh", lambda kind, shape, mesh_dim_names: asked.append((kind, shape))
    )
    for rank, replica in ((0, 0), (2, 0), (3, 1), (5, 1)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        world = model.setup(replicas=2)
        assert (world.rank, world.size, world.replica, world.replicas) == (rank, 6, replica, 2)
    assert asked == [("cpu", (2, 3))] * 4
    patience = model.PATIENCE  # as docs/clusters.md says
    assert patience == timedelta(hours=6)


def test_one_process_is_a_group_of_its_own(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = model.setup()
    try:
        assert (world.rank, world.size, world.replica, world.replicas) == (0, 1, 0, 1)
        assert (world.shard, world.shards) == (0, 1)
        assert world.mesh.mesh_dim_names == ("replica", "shard")
        assert world.sum(1.5, -2) == [1.5, -2.0]
        flat = flat_like([torch.zeros(2)])
        flat[0].fill_(3)
        world.sum_over_replicas(flat)
        assert flat[0].tolist() == [3, 3]
    finally:
        dist.destroy_process_group()


def test_sums_are_of_float64(process_group):
    assert World(CPU).sum(2**24 + 1, 0.1) == [2**24 + 1, 0.1]


def test_gradients_are_added_up_over_replicas_only(monkeypatch):
    """Four ranks, two replicas: not over the shards, which are different parts of the weights; one
    buffer, one collective."""
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: asked.append((x, group)))
    mesh = types.SimpleNamespace(get_group=lambda name: f"group of {name}")
    flat = flat_like([torch.zeros(2), torch.zeros(3)])
    World(CPU, 0, 4, 0, 2, mesh).sum_over_replicas(flat)
    ((buffer, group),) = asked
    assert buffer.shape == (5,)
    assert buffer is flat[1]._base
    assert group == "group of replica"
    asked.clear()
    World(CPU, 0, 1, 0, 1, mesh).sum_over_replicas(flat)
    assert not asked


def test_replicas_are_of_neighbouring_ranks(monkeypatch):
    """Of six ranks in two replicas, as the mesh has them: 0, 1, 2 and 3, 4, 5."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    monkeypatch.setattr(model, "init_device_mesh", lambda *_, **__: None)
    found = []
    for rank in range(6):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(model.setup(replicas=2).replica)
    assert found == [0, 0, 0, 1, 1, 1]


def test_sums_are_of_all_ranks(monkeypatch):
    """Also over replicas of one rank each."""
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: x.mul_(2))
    assert World(CPU, 0, 2).sum(1.5, -2) == [3, -4]
    flat = flat_like([torch.zeros(2)])
    flat[0].fill_(3)
    mesh = types.SimpleNamespace(get_group=lambda name: name)
    World(CPU, 0, 2, 0, 2, mesh).sum_over_replicas(flat)
    assert flat[0].tolist() == [6, 6]


@pytest.mark.parametrize("cuda", [False, True])
def test_a_rank_of_torchrun_has_its_gpu(cuda, monkeypatch):
    """LOCAL_RANK's, of the node; with torchrun's store, and CPU tensors by gloo."""
    asked = []

    def init(backend, timeout, device_id, **rest):
        asked.append((backend, device_id, set(rest)))

    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: asked.append(i))
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "get_rank", lambda: 6)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(model, "init_device_mesh", lambda kind, *_, **__: asked.append(kind))
    world = model.setup()
    if cuda:
        gpu = torch.device("cuda", 2)
        assert asked == [2, ("cpu:gloo,cuda:nccl", gpu, set()), "cuda"]
        assert world.device == gpu
    else:
        assert asked == [("gloo", None, set()), "cpu"]
        assert world.device == CPU
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("LOCAL_RANK")
    world = model.setup()
    assert asked[-2][2] == {"store", "rank", "world_size"}
    assert world.device == (torch.device("cuda", 0) if cuda else CPU)


def test_only_rank_0_speaks(capsys, monkeypatch):
    World(CPU).say("first")
    World(CPU, rank=1, size=2).say("second")
    assert capsys.readouterr().out == "first\n"
    monkeypatch.setattr(sys, "stdout", None)
    World(CPU).say("third")


# --------------------------------------------------------------------------------------------------
# Names, parts and sizes of models


def test_names_of_models(tmp_path):
    assert model.resolve("tiny") == str(ROOT / "tiny" / "models" / "tiny")
    assert model.resolve("someone/model") == "someone/model"
    (tmp_path / "config.json").write_text("{}")
    assert model.resolve(str(tmp_path)) == str(tmp_path)
    (tmp_path / "empty").mkdir()
    message = "empty is a folder without config.json: not a model in Hugging Face format"
    with pytest.raises(ModelError, match=message):
        model.resolve(str(tmp_path / "empty"))
    for name in ("./model", "/no/model", "~/no", "some/one/model"):
        with pytest.raises(ModelError, match=f"^no such model folder: {name}$"):
            model.resolve(name)


def test_folders_of_models_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert model.resolve("~/m") == str(tmp_path / "m")
    with pytest.raises(ModelError, match="^no such model folder: /no-model$"):
        model.resolve("/no-model")


def test_padding_is_the_end_where_there_is_none():
    tokenizer = types.SimpleNamespace(pad_token_id=7, eos_token="<|end|>", pad_token="own")
    model._give_pad_token(tokenizer, "m")
    assert tokenizer.pad_token == "own"

    class WithoutPadding:
        eos_token, pad_token = "<|end|>", None

        @property
        def pad_token_id(self):
            return None if self.pad_token is None else 3

    tokenizer = WithoutPadding()
    model._give_pad_token(tokenizer, "m")
    assert tokenizer.pad_token == "<|end|>"


def test_readers_of_pictures():
    """What a vision model reads with, and one line of a model that takes no pictures."""
    config, tokenizer, processor = model.load_readers("tiny", False)
    assert (config.model_type, processor) == ("llama", None)
    config, tokenizer, processor = model.load_readers("tiny_vision", True)
    assert hasattr(processor, "image_processor")
    assert tokenizer is processor.tokenizer
    assert tokenizer.chat_template
    with pytest.raises(ModelError, match="^tiny takes no pictures: use tiny_vision or"):
        model.load_processor("tiny")
    with pytest.raises(ModelError, match="^cannot load the processor of no/such"):
        model.load_processor("no/such")
    with pytest.raises(ModelError, match="^cannot load model no/such: .*hub name"):
        model.load_config("no/such")


def test_template_of_a_processor(monkeypatch):
    """Its own, else its tokenizer's."""
    for own, used in (("own", "own"), (None, "tokenizer's")):
        tokenizer = types.SimpleNamespace(pad_token_id=0, chat_template="tokenizer's")
        processor = types.SimpleNamespace(
            image_processor=None, tokenizer=tokenizer, chat_template=own
        )
        monkeypatch.setattr(
            transformers.AutoProcessor,
            "from_pretrained",
            lambda *_, trust_remote_code, processor=processor: processor,
        )
        assert model.load_processor("some/model") is processor
        assert tokenizer.chat_template == used


def test_a_processors_tokenizer_has_padding(monkeypatch):
    """Its end token where it has none of its own; without both it is refused."""
    tokenizer = types.SimpleNamespace(
        pad_token_id=None, eos_token="end", pad_token=None, chat_template="its"
    )
    processor = types.SimpleNamespace(image_processor=None, tokenizer=tokenizer, chat_template=None)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        model.load_processor("some/model")
    assert tokenizer.pad_token == "end"


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_hub_is_run_where_asked(trusted, monkeypatch):
    """Every class of the library that reads a model is told of it."""
    asked = []
    config, tokenizer = model.load_config("tiny")
    lm = model.skeleton(config)
    processor = types.SimpleNamespace(
        image_processor=None, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )

    def noted(kind, name, result):
        def read(*_, trust_remote_code=None, **__):
            asked.append((kind.__name__, trust_remote_code))
            return result

        monkeypatch.setattr(kind, name, read)

    causal = transformers.AutoModelForCausalLM
    noted(transformers.AutoConfig, "from_pretrained", config)
    noted(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    noted(transformers.AutoProcessor, "from_pretrained", processor)
    noted(causal, "from_pretrained", lm)
    noted(causal, "from_config", lm)
    name = "some/model"
    calls = [
        (model.load_config, (name, trusted), "AutoConfig AutoTokenizer"),
        (model.load_processor, (name, trusted), "AutoProcessor"),
        (model.load_readers, (name, True, trusted), "AutoConfig AutoTokenizer AutoProcessor"),
        (model.load_weights, (name, torch.float32, trusted), "AutoConfig AutoModelForCausalLM"),
        (model.skeleton, (config, torch.float32, None, trusted), "AutoModelForCausalLM"),
        (model.parameter_count, (config, trusted), "AutoModelForCausalLM"),
    ]
    for function, arguments, kinds in calls:
        asked.clear()
        function(*arguments)
        assert asked == [(kind, trusted) for kind in kinds.split()], function.__name__


def test_types_of_loaded_weights():
    """fp32 where nothing is said."""
    for asked, kind in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        assert {p.dtype for p in load_weights("tiny", **asked).parameters()} == {kind}
    config, _ = model.load_config("tiny")
    assert {p.dtype for p in model.skeleton(config).parameters()} == {torch.float32}


def test_code_of_the_hub_is_not_run_unasked():
    for name in ("load_config", "load_processor", "load_readers", "load_weights", "skeleton"):
        function = getattr(model, name)
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
    parameters = inspect.signature(model.parameter_count).parameters
    assert parameters["trust_remote_code"].default is False


def test_the_vision_part_is_not_trained():
    config, _ = model.load_config("tiny_vision")
    lm = model.skeleton(config)
    model.freeze_vision(lm)
    for name, p in lm.named_parameters():
        assert p.requires_grad == ("vision" not in name and "projector" not in name), name
    assert any(p.requires_grad for p in lm.parameters())
    assert not all(p.requires_grad for p in lm.parameters())
    lm = model.skeleton(model.load_config("tiny")[0])
    model.freeze_vision(lm)
    assert all(p.requires_grad for p in lm.parameters())


def test_a_head_of_its_own_is_trained_beside_frozen_vision():
    config, _ = model.load_config("tiny_vision")
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    lm = model.skeleton(config)
    output = lm.get_output_embeddings().weight
    assert output is not lm.get_input_embeddings().weight
    model.freeze_vision(lm)
    assert output.requires_grad


def test_dropout_is_all_that_is_turned_off():
    settings = {"attn_pdrop": 0.1, "resid_pdrop": 0.2, "n_embd": 32, "n_layer": 1, "n_head": 2}
    lm = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**settings))
    lm.kept = torch.nn.Module()
    lm.kept.scale, lm.kept.drop_rate, lm.kept.drop_last = 0.5, 0.3, True
    epsilon = lm.transformer.ln_f.eps
    model.turn_off_dropout(lm)
    rates = [m.p for m in lm.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}
    assert (lm.kept.scale, lm.kept.drop_rate, lm.kept.drop_last) == (0.5, 0.0, True)
    assert lm.transformer.ln_f.eps == epsilon


def test_blocks_and_parameters_are_counted():
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8  # q, k and v, o, the MLP, two norms
    assert model.parameter_count(config) == 3 * block + 2 * 10 * 8 + 8
    lm = model.skeleton(config, torch.bfloat16, attention="eager")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in lm.parameters()} == {"meta"}
    assert lm.config._attn_implementation == "eager"
    assert len(model.layers_to_shard(lm)) == 3
    assert model.layers_to_shard(torch.nn.Linear(2, 2)) == []


def test_weights_are_copied_into_a_skeleton():
    """Also tied ones, and buffers that are in no state dict."""
    source = load_weights("tiny")
    copy = model.skeleton(source.config)
    model.materialize(copy, source, CPU)
    for (name, p), q in zip(source.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(p, q), name
    for (name, p), q in zip(source.named_buffers(), copy.buffers(), strict=True):
        assert torch.equal(p, q), name
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.generation_config is source.generation_config
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(copy(ids).logits, source(ids).logits)


def test_weights_take_the_type_of_the_skeleton():
    source = load_weights("tiny")
    copy = model.skeleton(source.config, torch.bfloat16)
    model.materialize(copy, source, CPU)
    for p, q in zip(source.parameters(), copy.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)


def test_bytes_of_logits_and_cache():
    """Keys and values of 3 layers and 2 heads of 10 numbers; logits and their gradient, and
    both in fp32."""
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10,
    )  # fmt: skip
    assert model.cache_bytes(config, 11, 2) == 11 * 2 * 3 * 2 * 10 * 2
    gpt2 = transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4)  # heads of 6, none shared
    assert model.cache_bytes(gpt2, 11, 4) == 11 * 2 * 3 * 4 * 6 * 4
    assert model.logit_bytes(config, 11, 2) == 11 * 7 * 12
    assert model.logit_bytes(config, 11, 4) == 11 * 7 * 16
    assert model.logit_bytes(config, 2**30, 2) == 2**30


# --------------------------------------------------------------------------------------------------
# The loss in chunks, the check of the head, the schedule


@pytest.mark.parametrize(
    "vocabulary,sizes",
    [(2**25, [4, 3]), (2**26, [2, 2, 2, 1]), (2**28, [1] * 7), (2**24, [7]), (2**27 // 7, [7])],
)
def test_rows_of_a_chunk(vocabulary, sizes):
    """So many that their logits are 2^27 numbers, and never fewer than one."""
    seen = []

    def function(x, y):
        seen.append(len(x))
        return x * y

    x = torch.arange(7.0, requires_grad=True)
    found = model.by_chunks(function, vocabulary, x, x + 1)
    assert seen == sizes
    assert torch.cat(found).tolist() == [0, 2, 6, 12, 20, 30, 42]
    torch.cat(found).sum().backward()
    assert x.grad.tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert len(seen) == (1 if len(sizes) == 1 else 2 * len(sizes))  # again in backward


@pytest.mark.parametrize(
    "device,good,bad", [("cpu", 0.8e-3, 1.3e-3), ("cpu", -0.8e-3, -1.3e-3), ("cuda", 0.4, 0.7)]
)
def test_the_head_may_differ_by_rounding(device, good, bad, monkeypatch):
    """Of bf16 on a GPU: the sum over seven tokens to 0.5 nats."""
    lm, exact = load_weights("tiny"), model.token_loss
    world = types.SimpleNamespace(device=types.SimpleNamespace(type=device))
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, device=None: arange(*args))
    for off, refused in ((good, False), (bad, True)):
        monkeypatch.setattr(model, "token_loss", lambda *args, off=off: exact(*args) + off)
        with pytest.raises(ModelError) if refused else nullcontext():
            check_head(lm, world)


def test_schedule():
    """Linear warm-up to the peak, cosine from it to zero."""
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    got = [learning_rate(step, 8, 0.25) for step in range(8)]
    assert got == pytest.approx([0.5, 1.0, *cosine])
    assert [learning_rate(step, 4, 0) for step in range(4)] == pytest.approx(
        [1, 1, 0.75, 0.25]  # a step of warm-up is taken in any case
    )
    assert [learning_rate(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert learning_rate(0, 1, 0.1) == 1
    assert learning_rate(8, 8, 0.25) == pytest.approx(0)


def test_steps_of_warm_up_are_rounded():
    """17% of ten steps are two, 13% one."""
    assert [learning_rate(step, 10, 0.17) for step in (0, 1)] == [0.5, 1]
    assert learning_rate(0, 10, 0.13) == 1


@pytest.mark.parametrize("training", [True, False])
def test_whole_weights_for_a_while(training, process_group):
    """Within the block the model evaluates with the weights that it has; after it all is as it
    was."""
    lm = load_weights("tiny").train(training)
    ids = torch.tensor([[5, 6, 7]])
    expected = lm(ids).logits
    mesh = one_rank_mesh()
    blocks = model.layers_to_shard(lm)
    for module in (*blocks, lm):
        fully_shard(module, mesh=mesh["shard"])
    kept = []
    for module in (*blocks, lm):
        plain = module.set_reshard_after_forward
        module.set_reshard_after_forward = lambda on, recurse, module=module, plain=plain: (
            kept.append((module, on, recurse))
        )
    with model.gathered(lm):
        assert not lm.training
        assert not any(isinstance(p, DTensor) for p in lm.parameters())
        assert torch.equal(lm(ids).logits, expected)
        assert [(on, recurse) for _, on, recurse in kept] == [(False, False)] * 6
        kept.clear()
    assert lm.training == training
    assert all(isinstance(p, DTensor) for p in lm.parameters())
    assert {(module is lm, on, recurse) for module, on, recurse in kept} == {
        (True, False, False),
        (False, True, False),
    }


# --------------------------------------------------------------------------------------------------
# Buffers of shards, saving


def test_flat_buffers_are_views_of_one():
    tensors = [torch.ones(2, 3), torch.ones(4), torch.ones(())]
    flat = flat_like(tensors)
    assert [t.shape for t in flat] == [t.shape for t in tensors]
    (base,) = {id(t._base): t._base for t in flat}.values()
    assert base.tolist() == [0] * 11
    for i, t in enumerate(flat):
        t.fill_(i + 1)
    assert base.tolist() == [1] * 6 + [2] * 4 + [3]
    assert flat_like([torch.ones(2, dtype=torch.float64)], offload=True)[0].dtype == torch.float64


def test_where_a_flat_buffer_lies(monkeypatch):
    """With the tensors, or in CPU memory where offloaded: pinned if they are on a GPU."""
    there = [torch.zeros(2, device="meta")]
    assert flat_like(there)[0].device.type == "meta"
    assert flat_like(there, offload=True)[0].device.type == "cpu"
    asked, zeros = [], torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda n, pin_memory, **_: asked.append(pin_memory) or zeros(n)
    )
    for cuda in (True, False):
        tensor = types.SimpleNamespace(
            is_cuda=cuda, device=CPU, dtype=torch.float32, shape=(2,), numel=lambda: 2
        )
        flat_like([tensor], offload=True)
        flat_like([tensor])
    assert asked == [True, False, False, False]


def test_trained_parameters_are_shards_after_a_forward(process_group):
    """Though the root still shows its whole weights."""
    lm, mesh = load_weights("tiny"), one_rank_mesh()
    lm.model.norm.weight.requires_grad_(False)
    for module in (*model.layers_to_shard(lm), lm):
        fully_shard(module, mesh=mesh["shard"])
    with torch.no_grad():
        lm(torch.tensor([[5, 6, 7]]))
    params = model.trained_parameters(lm)
    assert len(params) == len(list(lm.parameters())) - 1
    assert all(isinstance(p, DTensor) for p in params)


def test_gradients_one_by_one():
    """Each is handed on once, whole (a tied weight after both uses), and dropped; parameters that
    are not trained have none."""
    a, b, c = (torch.nn.Parameter(torch.tensor([x])) for x in (2.0, 3.0, 5.0))
    lm = torch.nn.ParameterList([a, b, c])
    c.requires_grad_(False)
    params = model.trained_parameters(lm)
    assert [p.item() for p in params] == [2, 3]
    seen = {}
    with model.each_gradient(params, lambda i, g: seen.setdefault(i, []).append(g.item())):
        (a * b * c + a * a).backward()
    assert seen == {0: [19.0], 1: [10.0]}
    assert a.grad is None
    assert b.grad is None
    (a * b).backward()  # the hooks are gone
    assert (a.grad.item(), b.grad.item()) == (3, 2)
    assert len(seen[0]) == 1


def test_every_parameter_has_its_gradient():
    """A list that is too short is refused, not set in part."""
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    gradients = [torch.full((2,), 5.0), torch.full((3,), 7.0)]
    set_gradients(params, gradients)
    assert [p.grad.tolist() for p in params] == [[5, 5], [7, 7, 7]]
    assert params[0].grad is gradients[0]  # without a copy
    with pytest.raises(ValueError, match="shorter"):
        set_gradients(params, gradients[:1])


def test_a_checkpoint_has_all_weights_in_its_type(tmp_path):
    lm = load_weights("tiny")
    lm.register_buffer("counts", torch.tensor([3, 4]))
    weights = model.full_weights(lm, torch.bfloat16)
    assert weights.pop("counts").dtype == torch.int64
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    weights = model.full_weights(lm, torch.float32)
    weights["lm_head.weight"].zero_()  # a copy
    assert lm.lm_head.weight.abs().max() > 0


def test_a_saved_model(tmp_path):
    """Its type is that of its weights, also by its config; the model that is trained keeps its own
    end tokens; its library's defaults where it has no generation_config."""
    lm, (_, tokenizer) = load_weights("tiny"), model.load_config("tiny")
    lm.generation_config.eos_token_id = 9
    weights = model.full_weights(lm, torch.bfloat16)
    model.save_pretrained(tmp_path, lm, tokenizer, weights, torch.bfloat16)
    assert lm.generation_config.eos_token_id == 9
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [1, 9]
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    read = load_weights(str(tmp_path), torch.bfloat16)
    for (name, p), q in zip(lm.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q), name
    lm.generation_config = None
    model.save_pretrained(tmp_path / "none", lm, tokenizer, weights, torch.bfloat16)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "none")
    assert saved.eos_token_id == 1


def end_tokens(eos, pad, **settings):
    """(end tokens, padding token, do_sample) of a generation_config beside the embedded tokenizer,
    whose turns end with token 1 and whose padding is 0."""
    _, tokenizer = model.load_config("tiny")
    config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad, **settings)
    model._add_end_tokens(config, tokenizer)
    return config.eos_token_id, config.pad_token_id, config.do_sample


def test_end_tokens_of_a_checkpoint():
    assert end_tokens(None, None) == (1, 0, None)
    assert end_tokens(1, 5) == (1, 5, None)
    assert end_tokens(9, None) == ([1, 9], 0, None)
    assert end_tokens([9, 4], 5) == ([1, 4, 9], 5, None)
    assert end_tokens(1, 5, temperature=0.5) == (1, 5, True)  # as without sampling none is saved

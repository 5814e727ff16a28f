"""AttnLRP and CP-LRP beside LXT 2.1, on the architectures that it patches, each model from its configuration.

    python -m venv lxt && lxt/bin/pip install -r benchmarks/lxt.txt -e .
    lxt/bin/python benchmarks/against_lxt.py

LXT 2.1 does not import with the transformers of today, hence an environment of its own. undertow explains the models
first, as they are; LXT then patches their classes, for the whole process, and explains them. What is printed is the
relative difference (ℓ2) of the relevance of every embedding, in float32 and float64; the ViT's is that of every pixel.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision

import_torchvision()

import transformers  # noqa: E402
from lxt.efficient import monkey_patch  # noqa: E402
from torchvision.models import vision_transformer  # noqa: E402
from transformers.models.bert import modeling_bert  # noqa: E402
from transformers.models.gemma3 import modeling_gemma3  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3  # noqa: E402

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "attn_implementation": "sdpa"}
BERT = {**SIZES, "attn_implementation": "eager"}
GPT2 = {"vocab_size": 200, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
IDS = torch.arange(3, 51).reshape(2, 24) * 3 % 200

MODELS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "Llama": (modeling_llama, "attnlrp", lambda: modeling_llama.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))),
    "Qwen2": (modeling_qwen2, "attnlrp", lambda: modeling_qwen2.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER))),
    "Qwen3": (modeling_qwen3, "attnlrp", lambda: modeling_qwen3.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER))),
    "Gemma3": (
        modeling_gemma3,
        "attnlrp",
        lambda: modeling_gemma3.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**DECODER, sliding_window=8)),
    ),
    "GPT-2": (modeling_gpt2, "attnlrp", lambda: modeling_gpt2.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))),
    "BERT": (
        modeling_bert,
        "attnlrp",
        lambda: modeling_bert.BertForSequenceClassification(
            transformers.BertConfig(**SIZES, attn_implementation="eager")
        ),
    ),
    "torchvision ViT": (
        vision_transformer,
        "cp-lrp",
        lambda: vision_transformer.VisionTransformer(32, 8, 4, 4, 64, 128, num_classes=10),
    ),
}


def built(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """Return a model with random weights in which none is idle."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def fed(name: str, model: Any, dtype: torch.dtype) -> torch.Tensor:
    if name == "torchvision ViT":
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return model.get_input_embeddings()(IDS).detach()


def score(output: Any) -> torch.Tensor:
    """Return the score of class 1, or that of token 7 after the last one: one for each sample."""
    logits = getattr(output, "logits", output)
    return logits[:, -1, 7] if logits.ndim == 3 else logits[:, 1]


def called(name: str, model: Any) -> Callable[[torch.Tensor], Any]:
    return model if name == "torchvision ViT" else lambda x: model(inputs_embeds=x)


def main() -> None:
    warnings.simplefilter("ignore")
    dtypes = (torch.float32, torch.float64)
    ours = {}
    for name, (_, rule, make) in MODELS.items():
        for dtype in dtypes:
            model = built(make, dtype)
            call = called(name, model)
            ours[name, dtype] = ut.explain(call, fed(name, model, dtype), rule=rule, target=score).values
    lines = ["| network | rule | difference, float32 | float64 |", "|---|---|---:|---:|"]
    for name, (module, rule, make) in MODELS.items():
        monkey_patch(module)
        differences = []
        for dtype in dtypes:
            model = built(make, dtype)
            x = fed(name, model, dtype).requires_grad_()
            (g,) = torch.autograd.grad(score(called(name, model)(x)).sum(), x)
            theirs = (g * x).detach()
            differences.append(float((ours[name, dtype] - theirs).norm() / theirs.norm()))
        lines.append(f"| {name} | {rule} | {differences[0]:.0e} | {differences[1]:.0e} |")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, lxt 2.1")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

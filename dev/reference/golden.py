"""
Writes the golden states: tiny Llama models and what PyTorch says of them, which dev/test/test_model.c compares with
llama3.c. The reference is transformers' LlamaForCausalLM with eager attention and torch.optim.AdamW, fp32 on the CPU.

    python dev/reference/golden.py          rewrites dev/test/golden; the same bytes every time on the same machine

    dev/test/golden/NAME/config.json            as transformers 4 spells it
    dev/test/golden/NAME/config_v5.json         the same as transformers 5 spells it (one model)
    dev/test/golden/NAME/model.safetensors
    dev/test/golden/NAME/golden.safetensors
        ids labels (B, T)       I32; label t is the token after ids t, -100: ignored
        logits (B, T, V)  loss  mean over the labels that count
        grad.<name>             of the loss, for every parameter
        hyperparameters (6)     lr, beta1, beta2, eps, weight decay of matrices, clip: for ten AdamW steps on this batch
        losses norms (10)       of each step, before its update; the gradient's norm before clipping
        final.<name>            two parameters after the tenth step: a vector, which does not decay, and a matrix

Every model is run in double as well, to see that the reference itself uses at most a tenth of the tolerances (1e-4 of
the scale, 1e-5 for the losses).
"""
import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parent.parent / "test" / "golden"
STEPS, LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 10, 2e-3, 0.9, 0.95, 1e-8, 0.1
CLIP = 2.0  # some steps are clipped, some are not


def scaling(factor, original):
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original}


# group = NH / NKV. The context before scaling is so small that some frequencies are kept, some blended, some divided
MODELS = {
    #               C  L  NH NKV HD   F   V   tied   theta     scaling           eps   B   T
    "group1":     (32, 3,  4,  4,  8, 48, 61, True,    1e4, None,               1e-5,  1, 17),
    "group2":     (24, 2,  4,  2, 16, 40, 53, False,   1e4, scaling(8.0, 32),   1e-6,  2, 33),
    "group4":     (40, 2,  8,  2,  6, 56, 67, True,    100, scaling(32.0, 32),  1e-5,  3, 21),
    "one_kv":     (36, 2,  6,  1, 10, 44, 43, False,   5e5, None,               1e-2,  2, 27),
    "aligned":    (64, 1,  2,  1, 32, 96, 64, True,    5e5, scaling(32.0, 64),  1e-5,  2, 64),
}
IGNORED = "group4"     # some labels are -100, a whole sequence's among them
SPELLED_V5 = "group2"  # also has a config_v5.json
ODD_HEADER = "one_kv"  # its tensors lie at odd addresses


def config_v4(C, L, NH, NKV, HD, F, V, tied, theta, scaling, eps):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": C, "intermediate_size": F,
            "num_hidden_layers": L, "num_attention_heads": NH, "num_key_value_heads": NKV, "head_dim": HD,
            "vocab_size": V, "max_position_embeddings": 128, "rms_norm_eps": eps, "rope_theta": float(theta),
            "rope_scaling": scaling, "tie_word_embeddings": tied, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "float32"}


def randomise(model):
    """weights large enough for attention to be far from uniform, and norms that are not all 1"""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1, 0.2)
        else:
            parameter.data.normal_(0, 1 / parameter.shape[1] ** 0.5)


def run(model, ids, labels):
    """logits, loss, gradients, and what ten steps of AdamW do"""
    def loss_of():
        logits = model(ids).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    out = {}
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                   {"params": vectors, "weight_decay": 0.0}], lr=LR, betas=(BETA1, BETA2), eps=EPS)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        logits, loss = loss_of()
        loss.backward()
        if step == 0:
            out["logits"], out["loss"] = logits.detach().clone(), loss.detach().reshape(1)
            out.update({"grad." + name: p.grad.clone() for name, p in model.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        losses.append(loss.detach())
        optimizer.step()
    out["losses"], out["norms"] = torch.stack(losses), torch.stack(norms)
    for name in ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight"):
        out["final." + name] = model.get_parameter(name).detach().clone()
    return out


def build(config, weights=None, dtype=torch.float32):
    model = LlamaForCausalLM._from_config(LlamaConfig.from_dict(copy.deepcopy(config)), attn_implementation="eager").float()
    if weights:
        model.load_state_dict(weights)
    return model.to(dtype)


def check_scaling(model, config, weights, ids, logits):
    """fails unless the scaling keeps, blends and divides, and changes the logits"""
    plain, factor = build({**config, "rope_scaling": None}, weights), config["rope_scaling"]["factor"]
    ratio = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    kept, divided = ratio < 1.001, ratio > factor * 0.999
    assert kept.any() and divided.any() and (~kept & ~divided).any(), ratio
    moved = (plain(ids).logits - logits).abs().max() / logits.abs().max()
    assert moved > 0.05, moved


def make_header_odd(path):
    """takes the padding out of a safetensors header, and leaves it an odd number of bytes"""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = data[8:8 + n].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n:])


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for seed, (name, (*sizes, B, T)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        folder = GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        config = config_v4(*sizes)
        model = build(config)
        randomise(model)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        tokens = torch.randint(config["vocab_size"], (B, T + 1))
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
        if name == IGNORED:
            labels[0, :5] = labels[1] = labels[2, 7::3] = -100

        out = run(model, ids, labels)
        exact = run(build(config, weights, torch.float64), ids, labels)
        worst = max(((out[k] - exact[k]).abs().max() / exact[k].abs().max()).item()
                    for k in out if not k.startswith("final."))
        steps = max((out["losses"] - exact["losses"]).abs()).item()
        assert worst < 1e-5 and steps < 2e-6, (worst, steps)
        if config["rope_scaling"]:
            check_scaling(model, config, weights, ids, out["logits"])

        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if name == SPELLED_V5:
            (folder / "config_v5.json").write_text(model.config.to_json_string())
        saved = {k: v for k, v in weights.items() if not (config["tie_word_embeddings"] and k == "lm_head.weight")}
        save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
        if name == ODD_HEADER:
            make_header_odd(folder / "model.safetensors")
        out["ids"], out["labels"] = ids.int(), labels.int()
        out["hyperparameters"] = torch.tensor([LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP])
        save_file(out, folder / "golden.safetensors")
        print(f"{name:12} loss {out['losses'][0]:.4f} -> {out['losses'][-1]:.4f}  norm {out['norms'][0]:.3f} -> "
              f"{out['norms'][-1]:.3f}  from double: {worst:.1e}, losses {steps:.1e}")


if __name__ == "__main__":
    main()

"""Llama written out in fp64: no SGLang, no rag_kernels. What engines are compared with."""

from __future__ import annotations

import torch


class Oracle:
    """Llama in fp64 from a checkpoint folder."""

    def __init__(self, folder):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.w = {name: t.double() for name, t in model.state_dict().items()}
        self.layers = config.num_hidden_layers
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        self.freq = theta ** (-torch.arange(0, self.dim, 2).double() / self.dim)

    def rope(self, x, positions):
        angle = positions.double()[:, None, None] * self.freq
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def norm(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.w[name]

    def run(self, ids, rows, keys, values, *, stop=None, before=None, seen=None, reads=None):
        """Rows at rising positions over per-layer keys (rotated) and values, overwritten in place.

        ``reads`` says which keys each row may read, bool ``[rows, keys]``; all before it where not given.
        """
        h = self.w["model.embed_tokens.weight"][torch.tensor(ids)[rows]]
        length = keys[0].shape[0]
        mask = torch.arange(length)[None] > rows[:, None]
        if reads is not None:
            mask = mask | ~reads
        for layer in range(self.layers if stop is None else stop):
            p = f"model.layers.{layer}."
            x = self.norm(h, p + "input_layernorm.weight")
            q, k, v = (x @ self.w[p + f"self_attn.{n}_proj.weight"].T for n in "qkv")
            q = self.rope(q.view(len(rows), self.heads, -1), rows)
            k = self.rope(k.view(len(rows), self.kv_heads, -1), rows)
            v = v.view(len(rows), self.kv_heads, -1)
            if before is not None:
                before(layer, k, v)
            keys[layer][rows], values[layer][rows] = k, v
            group = self.heads // self.kv_heads
            kk, vv = (t[layer].repeat_interleave(group, 1) for t in (keys, values))
            logits = torch.einsum("rhd,khd->hrk", q, kk) / self.dim**0.5
            weights = logits.masked_fill(mask, -torch.inf).softmax(-1)
            if seen is not None:
                seen(layer, weights)
            out = torch.einsum("hrk,khd->rhd", weights, vv).flatten(1)
            h = h + out @ self.w[p + "self_attn.o_proj.weight"].T
            x = self.norm(h, p + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(x @ self.w[p + "mlp.gate_proj.weight"].T)
            h = (
                h
                + (gate * (x @ self.w[p + "mlp.up_proj.weight"].T))
                @ self.w[p + "mlp.down_proj.weight"].T
            )
        return h

    def log_probs(self, h):
        logits = self.norm(h[-1:], "model.norm.weight") @ self.w["lm_head.weight"].T
        return logits.log_softmax(-1)[0]

    def empty(self, length):
        shape = (length, self.kv_heads, self.dim)
        return [torch.zeros(shape).double() for _ in range(self.layers)]

    def fused_kv(self, prefix, chunks, ids):
        """Keys and values of the prompt before any row is recomputed."""
        keys, values, at = self.empty(len(ids)), self.empty(len(ids)), len(prefix)
        for chunk in chunks:
            ck, cv = self.empty(len(prefix) + len(chunk)), self.empty(len(prefix) + len(chunk))
            self.run(prefix + chunk, torch.arange(len(prefix) + len(chunk)), ck, cv)
            moved = torch.full((len(chunk),), at - len(prefix))
            for layer in range(self.layers):
                keys[layer][: len(prefix)] = ck[layer][: len(prefix)]
                values[layer][: len(prefix)] = cv[layer][: len(prefix)]
                keys[layer][at : at + len(chunk)] = self.rope(ck[layer][len(prefix) :], moved)
                values[layer][at : at + len(chunk)] = cv[layer][len(prefix) :]
            at += len(chunk)
        return keys, values

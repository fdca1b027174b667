"""Block-wise prefill with eviction written out in fp64: no SGLang, no rag_kernels, no retention rule of the package.

Every token keeps its true position, as if nothing had been evicted; a head of a layer sees its own kept keys only.
"""

from __future__ import annotations

import dataclasses

import torch
from fp64_oracle import Oracle


@dataclasses.dataclass
class Cache:
    """Per layer: keys and values ``[H][n, D]`` by head, and their true positions ``[H][n]``."""

    keys: list
    values: list
    positions: list


class MemoryOracle(Oracle):
    """Llama whose cache differs by layer and head."""

    def extend(self, ids, start, caches):
        """Rows of new tokens at true positions from `start` on, over caches that are tried in order.

        Parameters
        ----------
        ids : list of int
            New tokens.
        start : int
            True position of the first.
        caches : list of Cache
            What is read; nothing is written.

        Returns
        -------
        hidden states, queries ``[L][R, Q, D]``, and the cache of the new tokens alone.
        """
        rows = torch.arange(start, start + len(ids))
        h = self.w["model.embed_tokens.weight"][torch.tensor(ids)]
        queries, own = [], Cache([], [], [])
        group = self.heads // self.kv_heads
        causal = rows[:, None] >= rows[None]
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            x = self.norm(h, p + "input_layernorm.weight")
            q, k, v = (x @ self.w[p + f"self_attn.{n}_proj.weight"].T for n in "qkv")
            q = self.rope(q.view(len(rows), self.heads, -1), rows)
            k = self.rope(k.view(len(rows), self.kv_heads, -1), rows)
            v = v.view(len(rows), self.kv_heads, -1)
            out = torch.empty(len(rows), self.heads, self.dim, dtype=torch.float64)
            for head in range(self.heads):
                kv = head // group
                keys = torch.cat([c.keys[layer][kv] for c in caches] + [k[:, kv]])
                values = torch.cat([c.values[layer][kv] for c in caches] + [v[:, kv]])
                logits = q[:, head] @ keys.T / self.dim**0.5
                past = keys.shape[0] - len(rows)
                logits[:, past:] = logits[:, past:].masked_fill(~causal, -torch.inf)
                out[:, head] = logits.softmax(-1) @ values
            queries.append(q)
            own.keys.append([k[:, g] for g in range(self.kv_heads)])
            own.values.append([v[:, g] for g in range(self.kv_heads)])
            own.positions.append([rows for _ in range(self.kv_heads)])
            h = h + out.flatten(1) @ self.w[p + "self_attn.o_proj.weight"].T
            x = self.norm(h, p + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(x @ self.w[p + "mlp.gate_proj.weight"].T)
            up = x @ self.w[p + "mlp.up_proj.weight"].T
            h = h + (gate * up) @ self.w[p + "mlp.down_proj.weight"].T
        return h, queries, own

    def look(self, caches, queries):
        """Scores ``[L][H][n]``: largest softmax weight over these keys alone, by any row and query head of the group."""
        group = self.heads // self.kv_heads
        found = []
        for layer in range(self.layers):
            heads = []
            for kv in range(self.kv_heads):
                keys = torch.cat([c.keys[layer][kv] for c in caches])
                best = torch.zeros(keys.shape[0]).double()
                for head in range(kv * group, (kv + 1) * group):
                    weights = (queries[layer][:, head] @ keys.T / self.dim**0.5).softmax(-1)
                    best = torch.maximum(best, weights.amax(0))
                heads.append(best)
            found.append(heads)
        return found

    def join(self, *caches):
        """The caches as one, in order."""
        return Cache(
            *(
                [
                    [
                        torch.cat([getattr(c, name)[n][g] for c in caches])
                        for g in range(self.kv_heads)
                    ]
                    for n in range(self.layers)
                ]
                for name in ("keys", "values", "positions")
            )
        )

    def prefill(self, prefix):
        """Cache of what stands in front of all."""
        return self.extend(prefix, 0, [])[2]

    def moved(self, cache, distance):
        """The same cache with keys that stand so much further on."""
        turn = [
            [self.rope(k[:, None], torch.full((len(k),), distance))[:, 0] for k in heads]
            for heads in cache.keys
        ]
        return Cache(turn, cache.values, cache.positions)

    def step(self, shared, memory, block, probe, start):
        """Cache of all that competes after a block at true position `start`, and the scores of it.

        `shared` is read besides and does not compete; None for nothing.
        """
        held = [one for one in (shared, memory) if one is not None]
        _, _, new = self.extend(block, start, held)
        past = new if memory is None else self.join(memory, new)
        _, queries, _ = self.extend(probe, start + len(block), [*held, new])
        return past, self.look([past], queries)

    def follow(self, past, scores, positions, tolerance=1e-4, first=0):
        """The memory of these true positions ``[L, H, M]``, and its scores.

        Fails unless they are a right choice: rising, there, and none that was dropped has a better score. Scores near 1
        are equal in fp32 and not here, so a choice among equals is followed. The `first` columns stay in any case.
        """
        kept, by = Cache([], [], []), []
        for layer in range(self.layers):
            chosen = []
            for head in range(self.kv_heads):
                there = past.positions[layer][head].tolist()
                wanted = positions[layer, head].tolist()
                assert wanted == sorted(set(wanted) & set(there))
                score = scores[layer][head]
                columns = [there.index(one) for one in wanted]
                assert columns[:first] == list(range(first))
                dropped = [n for n in range(len(there)) if n not in set(columns)]
                if dropped:
                    assert (
                        float(score[dropped].max())
                        <= float(score[columns[first:]].min()) + tolerance
                    )
                chosen.append(columns)
            for name in ("keys", "values", "positions"):
                part = getattr(past, name)[layer]
                getattr(kept, name).append([part[g][c] for g, c in enumerate(chosen)])
            by.append([scores[layer][g][c] for g, c in enumerate(chosen)])
        return kept, by

    def answer(self, question, start, caches):
        """Log-probabilities of the token behind a question at its true position."""
        h, _, _ = self.extend(question, start, caches)
        return self.log_probs(h)

"""Steps of one case on an engine of its own: stock SGLang leaves out the fused ones, the plugin runs all.

Usage: interleaved.py stock|plugin MODEL_FOLDER CASE.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SETTINGS = {
    "dtype": "float32",
    # The platform's backend on both sides: another one adds in another order.
    "attention_backend": "rag_cpu",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "max_total_tokens": 8192,
    "skip_tokenizer_init": True,
    "random_seed": 1,
    "log_level": "error",
}


def facts(output):
    meta = output["meta_info"]
    return {
        "ids": list(output["output_ids"]),
        "logprobs": [entry[0] for entry in meta["output_token_logprobs"]],
        "top": [[entry[:2] for entry in row] for row in meta["output_top_logprobs"]],
        "input": [entry[0] for entry in meta.get("input_token_logprobs") or []],
        "cached": meta["cached_tokens"],
        "report": meta.get("rag_fusion"),
    }


def main() -> None:
    mode, folder, case_file, out_file = sys.argv[1:5]
    if mode == "stock":
        import sglang

        engine = sglang.Engine(model_path=folder, **SETTINGS)
    else:
        from rag_pipeline.sglang_plugin import create_engine

        engine = create_engine(folder, **SETTINGS)
    from sglang.srt.plugins.hook_registry import HookRegistry

    from rag_pipeline.protocol import FusionRequest
    from rag_pipeline.sglang_plugin import activation_of

    def ask(ids, fusion, new, start):
        hints = None
        if fusion is not None and mode == "plugin":
            if "spans" in fusion:
                spans = tuple(tuple(span) for span in fusion["spans"])
                fusion = {**fusion, "spans": spans, "prefix_len": spans[0][0]}
            hints = FusionRequest(**fusion).to_kv_hints()
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        return facts(
            engine.generate(
                input_ids=ids,
                sampling_params=sampling,
                return_logprob=True,
                logprob_start_len=start,
                top_logprobs_num=5,
                kv_hints=hints,
            )
        )

    seen = {"activation": activation_of(engine).to_json(), "patched": sorted(HookRegistry._patched)}
    seen |= {"exact": [], "fused": []}
    for step in json.loads(Path(case_file).read_text()):
        if step["kind"] == "flush":
            assert engine.flush_cache().success
        elif step["kind"] == "exact":
            got = ask(step["ids"], step.get("fusion"), step["new"], step.get("start", -1))
            seen["exact"].append(got)
        elif mode == "plugin":
            seen["fused"].append(ask(step["ids"], step["fusion"], step["new"], -1))
    engine.shutdown()
    Path(out_file).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

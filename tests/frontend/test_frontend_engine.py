"""Programs on the in-process engine, with real fusion."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from rag_pipeline import EngineError
from rag_pipeline.frontend import RagEngine, chunks, usage

pytestmark = pytest.mark.engine

# Of this test alone: the engine is shared, and it recognises stored text wherever it stands.
FACTS = [
    f"Report {n} on the island of Zorb{n}. The harbour of Zorb{n} was built by {who} in the year "
    f"{1500 + 7 * n}, and its lighthouse is painted {colour} from top to bottom every spring."
    for n, who, colour in ((1, "Ada", "red"), (2, "Grace", "green"), (3, "Edsger", "white"))
]


@sgl.function
def ask(s, documents, question):
    s += sgl.system("Use the given text to answer.")
    s += sgl.user("Text:\n\n" + chunks(documents) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=6))


def test_programs_reuse_chunks_in_batch_fork_and_stream(engine: Any) -> None:
    backend = RagEngine(engine, build_missing=True)
    orders = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    batch = [
        {"documents": [FACTS[i] for i in order], "question": "Which colour?"} for order in orders
    ]
    states = ask.run_batch(batch, backend=backend, temperature=0, num_threads=3)
    for state in states:
        used = usage(state, "answer")
        assert used.reused_tokens > used.recomputed_tokens > 0, used
        total = used.exact_prefix_tokens + used.reused_tokens + used.recomputed_tokens
        assert total + used.fresh_tokens == used.prompt_tokens
        assert used.fresh_tokens < 30

    @sgl.function
    def forked(s):
        s += sgl.system("Use the given text to answer.")
        s += sgl.user("Text:\n\n" + chunks(FACTS[::-1]) + "Name the builder.")
        s += sgl.assistant_begin()
        branches = s.fork(2)
        branches += lambda i: f"Answer {i}:" + sgl.gen("answer", max_tokens=4)
        s["used"] = [usage(branch, "answer") for branch in branches]
        branches.join()

    assert all(used.reused_tokens > 0 for used in forked.run(backend=backend)["used"])

    # The batch ran three prompts at once, whose sums may round otherwise; the first run settles the tree.
    whole = [ask.run(**batch[1], backend=backend, temperature=0)["answer"] for _ in range(2)][1]
    streamed = ask.run(**batch[1], backend=backend, temperature=0, stream=True)
    assert "".join(streamed.text_iter("answer")) == whole
    assert usage(streamed, "answer").reused_tokens > 0
    assert engine.flush_cache().success  # the engine's own calls still work in between


def test_policy_prefix_is_exact_and_select_works(engine: Any) -> None:
    exact = RagEngine(engine, policy="prefix")
    state = ask.run(documents=FACTS, question="Which colour?", backend=exact, temperature=0)
    used = usage(state, "answer")
    assert used.reused_tokens == used.recomputed_tokens == 0
    # What stock SGLang says to the same ids.
    ids, _ = exact.encode(state.text()[: state.text().index(state["answer"])])
    stock = engine.generate(
        input_ids=list(ids), sampling_params={"max_new_tokens": 6, "temperature": 0}
    )
    assert stock["text"] == state["answer"]

    @sgl.function
    def choose(s):
        s += sgl.user("The sky is blue. Which colour has the sky? One word.")
        s += sgl.assistant(sgl.select("pick", choices=["Blue", "Xylophone quartet"]))

    assert choose.run(backend=RagEngine(engine))["pick"] == "Blue"


def test_what_the_engine_refuses_is_one_line(engine: Any) -> None:
    backend = RagEngine(engine)
    with pytest.raises(EngineError, match="the engine refused the request") as error:
        backend.send({"input_ids": [5] * 20000, "sampling_params": {"max_new_tokens": 1}})
    assert "\n" not in str(error.value)

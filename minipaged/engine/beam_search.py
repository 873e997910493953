"""Chapter 9. Beam search, a client of the block manager and the runner: the few likeliest texts go on, and fork.

    schedule -> logits of every beam -> the likeliest continuations -> fork, extend and free (beam_scheduler.py)

The rules are those of transformers' beam search with its default arguments (checked against it by the suite). A text's
score is the sum of its tokens' log-probabilities, divided by (number of new tokens) ** length_penalty. Of the
2 * beam_width likeliest continuations, those among the first beam_width that end a text are kept as hypotheses; the
first beam_width that do not are the next beams.
Sources: the PagedAttention paper, sections 4.4 and 6.3; Wu et al., "Google's Neural Machine Translation System" (2016),
section 7, for the length penalty's purpose (theirs has another form).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from minipaged.engine.beam_scheduler import BeamScheduler, BeamSearchParams, Choice, Search
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.runner import forward_batch
from minipaged.engine.sequence import CompletionOutput, FinishReason, Request, RequestOutput


def beam_search(
    engine: LLMEngine, requests: list[Request], params: BeamSearchParams, on_token: Callable[[], None]
) -> list[RequestOutput]:
    """Search for every request, in step with one another. The engine's own requests keep their blocks, and wait.

    Raises ValueError, before anything runs, for a search that does not fit beside them. After an interrupt the next
    call of the engine recovers, and no block is lost.
    """
    end_tokens = frozenset(params.stop_token_ids or ())
    if not params.ignore_eos:
        end_tokens |= engine.tokenizer.eos_token_ids
    rooms = [engine.scheduler.max_model_len - len(request.seqs[0]) for request in requests]
    searches = [Search(params, each.seqs, end_tokens, room) for each, room in zip(requests, rooms, strict=True)]
    with engine.lock:  # other threads wait, and step their requests afterwards
        engine.recover()
        beams = BeamScheduler(engine.blocks, engine.scheduler.max_num_seqs, engine.scheduler.max_num_batched_tokens)
        for search in searches:
            beams.check(search)
        _run(engine, beams, searches, on_token)
    return [
        RequestOutput(each.request_id, each.prompt, search.prompt_token_ids, search.outputs(engine.tokenizer))
        for each, search in zip(requests, searches, strict=True)
    ]


def _run(engine: LLMEngine, beams: BeamScheduler, searches: list[Search], on_token: Callable[[], None]) -> None:
    with engine.changing():
        beams.waiting.extend(searches)
        while beams.waiting or beams.running:
            start = time.perf_counter()
            engine.begin_step()
            output = beams.schedule()
            batch = forward_batch(output, engine.blocks, engine.runner.device)
            with engine.recording(output):
                logits = engine.runner.run(output, batch)
            for search in beams.update_from_output(output):
                beams.advance(search, choose(search, logits[[output.sampled[beam] for beam in search.beams]]))
                on_token()
            engine.stats = engine.stats.after_step(output, 0.0, time.perf_counter() - start)


def choose(search: Search, logits: Tensor) -> list[Choice]:
    """One step. logits [num_beams, vocab_size]. Returns the next beams, best first; none where the search is over."""
    if not logits.isfinite().all():
        search.error = "logits are not finite: the weights are damaged, or a value overflowed"
        return []
    width, num_new = search.params.beam_width, len(search.beams[0].outputs) + 1
    logprobs = logits.double().cpu().log_softmax(-1)  # [num_beams, vocab_size]
    total = logprobs + torch.tensor(search.cumulative, dtype=torch.float64)[:, None]
    vocab_size = total.shape[1]
    num_candidates = min(max(2, 1 + len(search.end_tokens)) * width, total.numel())
    sums, places = total.flatten().topk(num_candidates)  # of all continuations of all beams

    choices: list[Choice] = []
    search.cumulative = []
    for rank, (total_logprob, place) in enumerate(zip(sums.tolist(), places.tolist(), strict=True)):
        parent, token = divmod(place, vocab_size)
        if token in search.end_tokens or num_new == search.max_tokens:
            if rank < width:
                reason: FinishReason = "stop" if token in search.end_tokens else "length"
                text = [each.token_id for each in search.beams[parent].outputs] + [token]
                output = CompletionOutput(0, "", text, reason, cumulative_logprob=total_logprob)
                output.score = total_logprob / num_new**search.params.length_penalty
                search.hypotheses.append((output.score, output))
        elif len(choices) < width:
            choices.append(Choice(parent, token))
            search.cumulative.append(total_logprob)
    search.hypotheses.sort(key=lambda hypothesis: -hypothesis[0])
    del search.hypotheses[width:]
    return [] if _is_over(search, num_new) else choices


def _is_over(search: Search, num_new: int) -> bool:
    if not search.cumulative or len(search.hypotheses) < search.params.beam_width:
        return not search.cumulative
    if search.params.early_stopping is True:
        return True
    penalty = search.params.length_penalty
    # A sum only falls with each token. Its mean may rise, the most if all further tokens were certain.
    length = search.max_tokens if search.params.early_stopping == "never" and penalty > 0 else num_new
    return search.cumulative[0] / length**penalty <= search.hypotheses[-1][0]

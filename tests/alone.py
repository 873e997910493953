"""The oracle of the engine's tests: one request by itself, with no cache, no scheduler and no block.

Every token is chosen from logits that the model computes from the whole text (chapter 2), so nothing that an earlier
step kept can be wrong. Sampling and detokenization are the engine's own; their suites test them by themselves.
"""

from minipaged.engine.beam_scheduler import BeamSearchParams, Search
from minipaged.engine.beam_search import choose
from minipaged.engine.detokenizer import IncrementalDetokenizer
from minipaged.engine.sampling import sample
from minipaged.engine.sequence import CompletionOutput, Request, RequestOutput, SamplingParams, Sequence, Token
from minipaged.model.recompute import next_logits


def alone(model, prompt_token_ids, params=None, seed=0, max_model_len=None) -> RequestOutput:
    """What an engine must answer. `seed` is for a request whose parameters have none."""
    params = params or SamplingParams()
    prompt, seed = list(prompt_token_ids), seed if params.seed is None else params.seed
    seqs = [Sequence("alone", index, prompt, params, seed) for index in range(params.n)]
    room = (max_model_len or model.transformer.config.max_position) - len(prompt)
    for seq in seqs:
        seq.detokenizer = IncrementalDetokenizer(params, model.tokenizer, min(params.max_tokens, room))
    while unfinished := [seq for seq in seqs if not seq.finish_reason]:
        logits = next_logits(model.transformer, [seq.tokens(0, len(seq)) for seq in unfinished])
        for seq, token in zip(unfinished, sample(logits, unfinished), strict=True):
            if isinstance(token, Exception):
                raise token
            seq.outputs.append(token)
            seq.detokenizer.push(token.token_id)
    return Request("alone", None, seqs, 0.0).output()


def beams_alone(model, prompt_token_ids, params=None, max_model_len=None) -> list[CompletionOutput]:
    """The hypotheses that a beam search must find, best first. A beam is its tokens, and owns no block."""
    params = params or BeamSearchParams()
    beam = Sequence("alone", 0, list(prompt_token_ids), SamplingParams(max_tokens=params.max_tokens))
    end_tokens = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        end_tokens |= model.tokenizer.eos_token_ids
    room = (max_model_len or model.transformer.config.max_position) - len(beam)
    search = Search(params, [beam], end_tokens, room)
    while search.beams:
        logits = next_logits(model.transformer, [beam.tokens(0, len(beam)) for beam in search.beams])
        choices = choose(search, logits)
        search.beams = [extended(search.beams[parent], rank, token) for rank, (parent, token) in enumerate(choices)]
    return search.outputs(model.tokenizer)


def extended(parent, index, token_id):
    beam = parent.fork(index)
    beam.outputs.append(Token(token_id, None, 0.0))
    return beam

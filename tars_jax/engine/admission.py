"""Requests are checked, and become sequences, in the thread of who sends them."""

from tars_jax.config import EngineConfig
from tars_jax.engine.masks import TokenSets
from tars_jax.engine.request import Request
from tars_jax.engine.sequence import Sequence
from tars_jax.engine.speculation import Draft, PromptLookup, Speculation
from tars_jax.errors import ContextOverflow, InvalidRequest
from tars_jax.loaders.loaded import Model


class Admission:
    """Makes the sequences of one engine. Safe to use from several threads."""

    def __init__(self, model: Model, config: EngineConfig, draft: Model | None = None) -> None:
        """``config`` is a resolved one."""
        self._model, self._config, self._draft = model, config, draft
        self._sets = TokenSets(model.tokenizer, model.config.vocab_size)

    def sequences(self, request: Request) -> list[Sequence]:
        """One for each answer of a request. Raises ContextOverflow or InvalidRequest."""
        self._check(request)
        return [self._sequence(request, index) for index in range(request.params.n)]

    def _check(self, request: Request) -> None:
        size, limit, vocab = len(request.prompt_ids), self._config.max_context, self._model.config.vocab_size
        if not size:
            raise InvalidRequest("the prompt is empty")
        if size >= limit:
            raise ContextOverflow(f"the prompt is {size} tokens long, but the context window is {limit}; shorten it or raise num_ctx")
        if wrong := [i for i in request.prompt_ids if not 0 <= i < vocab]:
            raise InvalidRequest(f"token {wrong[0]} is outside the vocabulary of {vocab}")
        if wrong := [token for token, _ in request.params.logit_bias if token >= vocab]:
            raise InvalidRequest(f"logit_bias: token {wrong[0]} is outside the vocabulary of {vocab}")

    def _sequence(self, request: Request, index: int) -> Sequence:
        params, model = request.params, self._model
        constraint = model.constraint(params.grammar, params.grammar_kind) if params.grammar else None
        mask = self._sets.mask(params, constraint)
        sequence = Sequence(request, model.tokenizer, self._config.max_context, mask=mask, index=index)
        sequence.breakers = self._sets.breakers(params)
        if mask is None and not params.mirostat:  # a guess would have to know what depends on the guess before it
            sequence.speculation = self._speculation()
        return sequence

    def _speculation(self) -> Speculation | None:
        if self._draft is not None:
            return Speculation(Draft())
        return Speculation(PromptLookup()) if self._config.prompt_lookup else None

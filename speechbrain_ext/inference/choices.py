"""Choices for the search of a trained model: its name, beam size, phrases and language model."""

import os
from contextlib import contextmanager
from typing import NamedTuple

from speechbrain_ext.decoders import BEAM, GREEDY_SEARCHES, LEAST_BEAM, TRANSDUCER_GREEDY
from speechbrain_ext.decoders.ctc_beam import WORD_BEAM, WORD_LM_WEIGHT, WORD_SCORE, CtcBeamSearch
from speechbrain_ext.decoders.phrases import normal_phrases, phrase_graph
from speechbrain_ext.decoders.searchers import LARGEST_BEAM, LARGEST_WEIGHT
from speechbrain_ext.decoders.token_ngram import LODR_WEIGHT, NGRAM_WEIGHT, is_arpa, is_of_tokens, ngram_graph
from speechbrain_ext.utils.errors import UserError, is_number, is_whole
from speechbrain_ext.utils.files import file_digest

NBEST = 16
"""Number of best texts under CTC, unless a beam size is chosen."""


class LanguageModel(NamedTuple):
    """A chosen language model."""

    source: str
    """Its file, folder or repository."""
    searches: tuple
    """Names of the searches that use it."""
    settings: dict
    """Its weight and other settings, as in the results table."""
    digests: list = []
    """Digests of its files."""
    graphs: list = []
    """Token graphs, for an n-gram of tokens."""
    words: CtcBeamSearch | None = None
    """The CTC beam search with an n-gram of words."""
    scorer: object = None
    """The joint search's scorer, for a model of SpeechBrain."""


class Choices(NamedTuple):
    """What was chosen for the search. With these values nothing was, and the model uses its own search."""

    searches: tuple = ()
    beam_size: int | None = None
    phrases: dict = {}
    phrase_graphs: list = []
    lm: LanguageModel | None = None


class SearchChoices:
    """What all models share. They state their searches, and give the choices to them."""

    searches = ()
    """Names of the searches that the model has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.choices, self._is_choosing = Choices(), False
        """What was chosen, as :class:`Choices`."""

    @property
    def own_search(self):
        """The search that the model uses."""
        return self.own_searches[0]

    @property
    def own_searches(self):
        """The search that the model uses, and others that were chosen to compare it with."""
        return self.choices.searches or (self.usual_search(),)

    @property
    def beam_size(self):
        """The chosen number of hypotheses; None = the search's default."""
        return self.choices.beam_size

    @property
    def phrases(self):
        """Phrases that the beams prefer."""
        return tuple(self.choices.phrases)

    @property
    def graphs(self):
        """Token graphs of phrases and n-grams, for the beams."""
        lm = self.choices.lm
        return [*self.choices.phrase_graphs, *(lm.graphs if lm else [])]

    @property
    def search_settings(self):
        """Settings of the search, chosen or not, for files that depend on them."""
        search, phrases, lm = self.own_search, self.choices.phrases, self.choices.lm
        settings = {"search": search, "beam": self.beam_of(search), "phrases": phrases}
        settings["lm"] = lm and [*(lm.digests or [lm.source]), *lm.settings.values()]
        return {name: value for name, value in settings.items() if value}

    def beam_of(self, search):
        """The number of hypotheses of a search."""
        if search in GREEDY_SEARCHES:
            return 1
        lm = self.choices.lm
        return self.beam_size or (WORD_BEAM if search == BEAM and lm and lm.words else self.usual_beam(search))

    def lm_of(self, search):
        """The source of the language model that a search uses, and its settings by name; (None, {}) without one."""
        lm = self.choices.lm
        return (lm.source, lm.settings) if lm and search in lm.searches else (None, {})

    @contextmanager
    def choosing(self):
        """A context for several choices, in any order: they are checked together at its end, and kept all or not at all.

        Raises
        ------
        UserError
            If the choices do not fit each other or the model.
        """
        if self._is_choosing:
            yield
            return
        before, self._is_choosing = self.choices, True
        try:
            yield
            self.check_choices(before)
            self.use_choices()
        except BaseException:
            self.choices = before
            self.use_choices()
            raise
        finally:
            self._is_choosing = False

    def _choose(self, **choices):
        with self.choosing():
            self.choices = self.choices._replace(**choices)

    def choose_search(self, name, *others):
        """Choose the search that the model uses.

        Arguments
        ---------
        name : str
            Its name; None = the model's own.
        *others : str
            Further searches to compare it with, see :func:`speechbrain_ext.inference.evaluate.make_searches`.

        Raises
        ------
        UserError
            If the model has no such search; or if none of the searches takes the phrases, the language model or the beam size.
        """
        names = (name, *others) if name is not None else ()
        if unknown := [each for each in names if each not in self.searches]:
            raise UserError(f"The model has no search {unknown[0]}; it has {', '.join(self.searches)}.")
        self._choose(searches=tuple(dict.fromkeys(names)))

    def choose_beam(self, beam_size):
        """Choose the number of hypotheses of the beams; None = that of the model.

        Raises
        ------
        UserError
            If it is not a valid number, or the model uses greedy search.
        """
        if beam_size is not None and not is_whole(beam_size, 1, LARGEST_BEAM):
            raise UserError(f"The beam size is {beam_size!r}; give a whole number from 1 to {LARGEST_BEAM}.")
        self._choose(beam_size=beam_size)

    def choose_phrases(self, phrases):
        """Prefer phrases in the beams, in place of earlier ones. A CTC model that uses greedy search by default then uses a beam.

        Arguments
        ---------
        phrases : dict
            A bonus for each phrase, None = 2 per token; as :func:`speechbrain_ext.decoders.phrases.read_phrases` reads them.
            None or an empty dict = no phrases.

        Raises
        ------
        UserError
            If the tokenizer cannot write a phrase, one is given twice, a bonus is no number from 0 to 1000, or the model's search
            takes no phrases.
        """
        phrases = normal_phrases(phrases or {})
        self._choose(phrases=phrases, phrase_graphs=[phrase_graph(phrases, self.tokenizer)] if phrases else [])

    def choose_lm(self, source, weight=None, temperature=None, lodr=None, lodr_weight=None, word_score=None):
        """Use a language model in the beams, in place of an earlier one. A CTC model that uses greedy search by default then uses
        a beam.

        Arguments
        ---------
        source : str
            An ARPA file of the model's tokens, as ``ngram --tokens`` writes them, for any beam; an ARPA file of words for
            ``ctc_beam``; or, for the joint search and rescoring, a folder or Hugging Face repository of SpeechBrain, see
            :func:`speechbrain_ext.model_folder.lm.load_lm`. None = no language model.
        weight : float, optional
            Weight of its log-probabilities, 0 to 100; by default 0.3 for tokens, 0.5 for words, else 0.6. With 0 it is not used.
        temperature : float, optional
            Divides the logits of SpeechBrain's language models; by default 1.15.
        lodr : str, optional
            An ARPA file to subtract: a 2-gram of tokens, of the model's training transcripts.
        lodr_weight : float, optional
            Weight of the log-probabilities of ``lodr``, 0 to 100; by default 0.15.
        word_score : float, optional
            Bonus per word, with an n-gram of words; by default 1.5.

        Raises
        ------
        FileNotFoundError
            If there is no such file or repository.
        UserError
            If it is for other tokens or cannot be used, or the model's search does not use it.
        """
        given = {"temperature": temperature, "lodr": lodr, "lodr_weight": lodr_weight, "word_score": word_score}
        given = {name: value for name, value in given.items() if value is not None}
        if source is None:
            self._choose(lm=None)
            return
        source = os.fspath(source)
        if weight is not None and not is_number(weight, 0, LARGEST_WEIGHT):
            raise UserError(f"The weight of the language model {source} is {weight!r}; give a number from 0 to {LARGEST_WEIGHT}.")
        if not is_arpa(source):
            kind, takes, make = "of SpeechBrain", ("temperature",), self.neural_lm
        elif is_of_tokens(source):
            kind, takes, make = "of tokens", ("lodr", "lodr_weight"), self._token_lm
        else:
            kind, takes, make = "of words", ("word_score",), self._word_lm
        if others := [name for name in given if name not in takes]:
            option = others[0].replace("_", "-").replace("temperature", "lm-temperature")
            raise UserError(
                f"--{option} is given, but the language model {source} is {kind}, which does not use it; leave it out."
            )
        if lodr is None and lodr_weight is not None:
            raise UserError("--lodr-weight is given, but there is no --lodr; give one, or leave the weight out.")
        self._choose(lm=make(source, weight, **given))

    def _token_lm(self, source, weight, lodr=None, lodr_weight=LODR_WEIGHT):
        """An n-gram of tokens."""
        weight, others = NGRAM_WEIGHT if weight is None else weight, {}
        graphs = [(weight, ngram_graph(source, self.tokenizer, weight))]
        if lodr is not None:
            lodr = os.fspath(lodr)
            if not is_number(lodr_weight, 0, LARGEST_WEIGHT):
                raise UserError(
                    f"The weight of the language model {lodr} is {lodr_weight!r}; give a number from 0 to {LARGEST_WEIGHT}."
                )
            graphs.append((lodr_weight, ngram_graph(lodr, self.tokenizer, -lodr_weight)))
            others = {"lodr": lodr, "lodr_weight": lodr_weight}
        graphs = [graph for share, graph in graphs if share]
        digests = [file_digest(path) for path in (source, lodr) if path is not None]
        searches = tuple(name for name in self.searches if name not in GREEDY_SEARCHES)
        return LanguageModel(source, searches, {"lm_weight": weight, **others}, digests, graphs) if weight else None

    def _word_lm(self, source, weight, word_score=WORD_SCORE):
        """An n-gram of words."""
        weight = WORD_LM_WEIGHT if weight is None else weight
        if not weight:
            return None
        keys = {"lm_weight": weight, "word_score": word_score}
        search = CtcBeamSearch(self.tokenizer, self.blank, self.beam_size or WORD_BEAM, lm_file=source, **keys)
        return LanguageModel(source, (BEAM,), keys, [file_digest(source)], words=search)

    def neural_lm(self, source, weight, temperature=None):
        """A model of SpeechBrain."""
        raise UserError(
            f"The language model is {source!r}, but a model without an attention decoder takes only ARPA files; give the path of "
            "one."
        )

    def usual_search(self):
        """The search that is used if none was chosen."""
        raise NotImplementedError

    def usual_beam(self, search):
        """The number of hypotheses that is used if none was chosen."""
        return NBEST

    def check_choices(self, before):
        """Refuse choices that do not fit each other. ``before`` are the last ones that do."""
        chosen, names = self.choices, self.own_searches
        beams = [name for name in names if name not in GREEDY_SEARCHES]
        others = " or ".join(name for name in self.searches if name not in GREEDY_SEARCHES)
        is_one = chosen.beam_size == 1 and TRANSDUCER_GREEDY in names  # greedy search is a beam of 1
        is_new = chosen.beam_size != before.beam_size or chosen.searches not in ((), before.searches)
        if chosen.beam_size is not None and is_new and not beams and not is_one:
            raise UserError(
                f"The beam size is {chosen.beam_size}, but the model uses {names[0]}, which has no beam; choose {others}, or "
                "leave the beam size out."
            )
        if (chosen.phrases or chosen.lm) and not beams:
            remedy = f"choose {others}" if chosen.searches else "give a beam size above 1"
            raise UserError(f"The model uses {names[0]}, which takes no phrases or language models; {remedy}, or leave them out.")
        if chosen.lm and not set(names) & set(chosen.lm.searches):
            raise UserError(
                f"The model uses {' and '.join(names)}, but the language model {chosen.lm.source} is for "
                f"{' and '.join(chosen.lm.searches)} only; choose one of these, or give an ARPA file of tokens, written with "
                "ngram --tokens."
            )
        if chosen.lm and chosen.lm.words and chosen.phrases:
            raise UserError(
                f"The language model {chosen.lm.source} is of words, and {BEAM} does not use it together with phrases; leave out "
                "--phrases, or give --lm an ARPA file of tokens, written with ngram --tokens."
            )
        for name in LEAST_BEAM.keys() & names:
            if self.beam_of(name) < LEAST_BEAM[name]:
                raise UserError(
                    f"The beam size of {name} is {self.beam_of(name)}; give {LEAST_BEAM[name]} or more, or choose another search."
                )

    def use_choices(self):
        """Give the choices to the searches."""
        lm = self.choices.lm
        if lm and lm.words:
            lm.words.use_beam(self.beam_of(BEAM))
            lm.words.check()

"""Searches, their scorers and language models, and the alignment of words."""

GREEDY, BEAM, JOINT, RESCORED = "ctc_greedy", "ctc_beam", "joint_beam", "ctc_rescored"
TRANSDUCER_GREEDY, TRANSDUCER_BEAM = "transducer_greedy", "transducer_beam"
"""Names of the searches in reports."""
GREEDY_SEARCHES = GREEDY, TRANSDUCER_GREEDY
"""Those without a beam, which take neither phrases nor language models."""
LEAST_BEAM = {RESCORED: 2, TRANSDUCER_BEAM: 2}
"""The smallest beam size of searches that with one hypothesis would be others."""


def search_name(pass_name, search, with_lm=False):
    """The name of a search in reports, with its pass if the encoder has several. The joint search with a language model has a
    separate name.

    Example
    -------
    >>> search_name(None, GREEDY), search_name("first", GREEDY), search_name(None, JOINT, with_lm=True)
    ('ctc_greedy', 'first_pass_ctc_greedy', 'joint_beam_lm')
    """
    name = f"{search}_lm" if with_lm and search == JOINT else search
    return name if pass_name is None else f"{pass_name}_pass_{name}"

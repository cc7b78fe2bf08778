"""Searches, their scorers and language models, and the alignment of words."""

GREEDY, BEAM, JOINT, RESCORED = "ctc_greedy", "ctc_beam", "joint_beam", "ctc_rescored"
TRANSDUCER_GREEDY, TRANSDUCER_BEAM = "transducer_greedy", "transducer_beam"
"""Names of the searches in reports."""


def search_name(pass_name, search):
    """The name of a search in reports, with its pass if the encoder has several.

    Example
    -------
    >>> search_name(None, GREEDY), search_name("first", GREEDY)
    ('ctc_greedy', 'first_pass_ctc_greedy')
    """
    return search if pass_name is None else f"{pass_name}_pass_{search}"

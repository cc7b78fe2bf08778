"""The format of a trained model: a folder with everything that inference needs, and no code.

==================== =====================================================================================================
``hyperparams.yaml``  how to build the model: classes and their arguments, no settings of training (read by :mod:`.build`)
``asr.safetensors``   weights and feature statistics, by name (:mod:`.weights`)
``tokenizer.ckpt``    the SentencePiece model
``config.json``       version of this format, and the class of SpeechBrain that loads the folder
``README.md``         the model card (:mod:`.card`)
==================== =====================================================================================================

Class paths in ``hyperparams.yaml`` are part of the format: a class that folders name must not move. The tests contain a folder
of each kind, which must always load.
"""

FORMAT_VERSION = 1

HYPERPARAMS, CONFIG, WEIGHTS, TOKENIZER, CARD = (
    "hyperparams.yaml",
    "config.json",
    "asr.safetensors",
    "tokenizer.ckpt",
    "README.md",
)
FILES = (HYPERPARAMS, CONFIG, WEIGHTS, TOKENIZER)
"""The files that loading needs."""

"""The format of a trained model: a folder that holds all that inference needs, and nothing that runs.

==================== =====================================================================================================
``hyperparams.yaml``  how to build the model: classes and their arguments, nothing of its training (:mod:`.build` reads it)
``asr.safetensors``   weights and feature statistics, by name (:mod:`.weights`)
``tokenizer.ckpt``    the SentencePiece model
``config.json``       version of this format, and the class of SpeechBrain that loads the folder
``README.md``         the model card (:mod:`.card`)
==================== =====================================================================================================

Class paths in ``hyperparams.yaml`` are part of the format: a class that folders name does not move. A folder of each kind lies
in the tests, and must always load.
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
"""What loading needs."""

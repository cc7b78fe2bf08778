"""Encoders and what one would use otherwise, measured on this machine: ``python -m speechbrain_ext bench``.

``models.py`` says what is compared, ``audio.py`` what stands around it from samples or files on, ``graphs.py`` how streams become
CUDA graphs, ``speechbrain_ext.utils.measure`` how times are taken, ``run.py`` goes through it row by row, and ``report.py`` makes
tables and plots of the rows.
"""

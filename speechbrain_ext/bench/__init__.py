"""Benchmark of encoders and their alternatives on this machine: ``python -m speechbrain_ext bench``.

``models.py`` defines the compared models, ``audio.py`` the steps from audio to features and tokens, and ``graphs.py`` streams as
CUDA graphs. ``speechbrain_ext.utils.measure`` takes the times, ``run.py`` measures row by row, and ``report.py`` makes tables and
plots of the rows.
"""

"""Encoders and what one would use otherwise, measured on this machine: ``python -m speechbrain_ext bench``.

``models.py`` says what is compared, ``measure.py`` how, ``run.py`` goes through it row by row, and ``report.py`` makes tables and
plots of the rows.
"""
